"""A DiT and its training loop said anew from their formulas, as modules.

Peebles & Xie 2023 (arXiv:2212.09748); the loss is that of Nichol & Dhariwal 2021
(arXiv:2102.09672), section 3.1: the mean squared error of the noise, and the KL term of a variance
between both bounds, with the mean fixed.
"""

import math

import torch
from convert.published import COND, Block, D
from models.tiny import randomise
from torch import nn

STEPS, CHANNELS, SIDE, PATCH, CLASSES = 1000, 4, 6, 2, 5
BETAS = torch.linspace(1e-4, 0.02, STEPS, dtype=torch.float64)
KEPT = torch.cumprod(1 - BETAS, dim=0)
BEFORE = torch.cat([KEPT.new_ones(1), KEPT[:-1]])
# of the posterior q(x[t-1] | x[t], x[0]); its variance is 0 at the first step
VARIANCE = BETAS * (1 - BEFORE) / (1 - KEPT)
OF_START, OF_NOISY = (
    BETAS * BEFORE.sqrt() / (1 - KEPT),
    (1 - BETAS).sqrt() * (1 - BEFORE) / (1 - KEPT),
)


class DiT(nn.Module):
    def __init__(self, depth=2):
        super().__init__()
        self.x_embedder = nn.Conv2d(CHANNELS, D, PATCH, PATCH)
        self.t_embedder = nn.Sequential(nn.Linear(16, COND), nn.SiLU(), nn.Linear(COND, COND))
        self.y_embedder = nn.Embedding(CLASSES, COND)
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.modulation, self.norm = nn.Linear(COND, 2 * D), nn.LayerNorm(D, 1e-6, False)
        self.linear = nn.Linear(D, 2 * CHANNELS * PATCH**2)
        randomise(self, 0.1)

    def forward(self, x, t, y):
        rates = torch.exp(-math.log(10000) * torch.arange(8) / 8)
        angles = t[:, None] * rates
        c = self.t_embedder(torch.cat([angles.cos(), angles.sin()], dim=-1)) + self.y_embedder(y)
        x = self.x_embedder(x).flatten(2).mT
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.modulation(nn.functional.silu(c))[:, None].chunk(2, dim=-1)
        x = self.linear(self.norm(x) * (1 + scale) + shift)
        grid = x.unflatten(1, (SIDE // PATCH,) * 2).unflatten(-1, (PATCH, PATCH, -1))
        return torch.einsum("bhwpqc->bchpwq", grid).flatten(4).flatten(2, 3)


def loss_of(model, start, t, y, noise):
    def at(values):
        return values[t].float()[:, None, None, None]

    noisy = at(KEPT.sqrt()) * start + at((1 - KEPT).sqrt()) * noise
    predicted, between = model(noisy, t, y).chunk(2, dim=1)
    least, most = at(VARIANCE.log()), at(BETAS.log())
    share = (between + 1) / 2
    log_variance = share * most + (1 - share) * least
    guess = (noisy - at((1 - KEPT).sqrt()) * predicted.detach()) / at(KEPT.sqrt())
    means = [at(OF_START) * x + at(OF_NOISY) * noisy for x in (start, guess)]
    squared = (means[0] - means[1]).square() * torch.exp(-log_variance)
    kl = (log_variance - least - 1 + torch.exp(least - log_variance) + squared) / 2
    return (predicted - noise).square().mean() + kl.mean() / math.log(2)


def losses(model, optimizer, count=6):
    """Of so many steps of training, with the same samples, steps and noise every time."""
    random, found = torch.Generator().manual_seed(5), []
    for _ in range(count):
        start, noise = torch.randn(2, 3, CHANNELS, SIDE, SIDE, generator=random)
        t = torch.randint(1, STEPS, (3,), generator=random)  # the first has a term of its own
        y = torch.randint(CLASSES, (3,), generator=random)
        loss = loss_of(model, start, t, y, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found
