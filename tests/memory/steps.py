"""Small networks and their steps, whose bytes can be counted by hand."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

B, D, FLOAT = 6, 8, 4  # FLOAT: bytes of a float32


def one_parameter(count=10):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(count))
    return model


class Chain(nn.Module):
    """Linear and relu, some layers deep; one (B, D) storage saved per layer."""

    def __init__(self, depth, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(depth))
        self.checkpointed = checkpointed

    def layer(self, linear, x):
        return F.relu(linear(x))

    def forward(self, x):
        for linear in self.layers:
            if self.checkpointed:
                x = checkpoint(self.layer, linear, x, use_reentrant=False)
            else:
                x = self.layer(linear, x)
        return x


class Transformer(nn.Module):
    """A residual transformer, small but with real attention and dropout."""

    def __init__(self, depth=3, width=64, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, F.gelu, batch_first=True)
            for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def train_step(model, optimizer, x, micro_batches=1, autocast=False):
    """A step whose gradients are gone when it ends."""

    def step():
        for part in x.chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (model(part).float() - part).square().mean()
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
