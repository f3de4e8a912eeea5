"""NoProp-DT: a net for each of T steps, each trained on noisy embeddings of its own step.

    A_t     = cos(pi / 2 * ((T - t) / T + s) / (1 + s))**2     rises from A_0 = 0, and s = OFFSET
    SNR(t)  = A_t / (1 - A_t)
    z_t     ~ N(sqrt(A_t) u_y, 1 - A_t)                        of the label alone
    loss_t  = CE(read_out(z_T), y) + KL(q(z_0 | y) | N(0, 1))
              + T / 2 * ETA * (SNR(t) - SNR(t - 1)) * |u_hat_t(z_(t-1), image) - u_y|**2

and an image is answered with equation 3, from z_0 ~ N(0, 1):

    z_t = a_t u_hat_t(z_(t-1), image) + b_t z_(t-1) + sqrt(c_t) noise
    a_t = sqrt(A_t) (1 - r_t) / (1 - A_(t-1)),            r_t = A_(t-1) / A_t
    b_t = sqrt(r_t) (1 - A_t) / (1 - A_(t-1)),            c_t = (1 - A_t) (1 - r_t) / (1 - A_(t-1))

Li, Teh & Pascanu 2025 (arXiv:2503.24322), equations 3 and 8: 46.06 % on CIFAR-100. A step moves
its own net, and the embeddings and the read-out, which all nets share. No net is run for another.

Decisions. T is 10 for the CNN; of a transformer each layer is a net, so that a net is as small as
a block can be. The cosine is not divided by its value at t = T, where SNR would be endless; so
A_T is short of 1 by about 1.6e-4. At t = 1 nothing needs a guard, for A_0 is 0, as then is the KL.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.baseline import CNNConfig, Parts, Sizes, purpose
from baselines.noprop import NoProp, square_error
from dbkernels.data.images import Batch
from dbkernels.ops.philox import Draw, normals
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block

NETS, ETA, OFFSET = 10, 0.1, 0.008


class NoPropDT(NoProp):
    """A block for each net."""

    name = "noprop-dt"

    def make(self, sizes: Sizes) -> DiffusionBlocks:
        count = NETS if isinstance(sizes, CNNConfig) else sizes.depth
        self.signal = cosine_signal(count)
        nets = [self.net(sizes, 1, self.num_classes, timed=False) for _ in range(count)]
        return self.with_ends(Parts(nets, independent=True))

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        A, t, label = self.signal, block.index + 1, batch["label"]
        u = self.embedded(label)
        last, z = (noisy(u, A[k], purpose(draw, place)) for place, k in enumerate((-1, t - 1)))
        u_hat = self.estimate(self.model.layers[t - 1](z, batch["image"], None))
        weight = (len(A) - 1) / 2 * ETA * (snr(A[t]) - snr(A[t - 1]))
        error = weight * square_error(u_hat, u)
        return F.cross_entropy(self.read_out(last), label) + (kl(u, A[0]) + error).mean()

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.last_logits(batch, draw).softmax(-1)

    def last_logits(self, batch: Batch, draw: Draw) -> Tensor:
        """Logits (B, C) of z_T, of steps through all nets."""
        image, noise = batch["image"], self._noises(batch, draw)
        z = next(noise)
        for net, (a, b, c) in zip(self.model.layers, posteriors(self.signal), strict=True):
            u_hat = self.estimate(net(z, image, None))
            z = a * u_hat + b * z + math.sqrt(c) * next(noise)
        return self.read_out(z)

    def _noises(self, batch: Batch, draw: Draw) -> Iterator[Tensor]:
        image = batch["image"]
        for place in range(len(self.signal)):
            yield normals(purpose(draw, place), len(image), self.width, image.device)


def cosine_signal(count: int) -> list[float]:
    """A_0, 0, to A_T of T = count."""
    left = ((count - t) / count for t in range(count + 1))
    signal = [math.cos(math.pi / 2 * (each + OFFSET) / (1 + OFFSET)) ** 2 for each in left]
    return [0.0, *signal[1:]]


def snr(signal: float) -> float:
    """Signal to noise, by their variances."""
    return signal / (1 - signal)


def noisy(u: Tensor, signal: float, draw: Draw) -> Tensor:
    """z of u (B, width) where its square has a share `signal` of the variance; gradients pass."""
    noise = normals(draw, *u.shape, u.device)
    return math.sqrt(signal) * u + math.sqrt(1 - signal) * noise


def posteriors(signal: list[float]) -> list[tuple[float, float, float]]:
    """a_t, b_t and c_t for t = 1 to T."""
    found = []
    for before, after in pairwise(signal):
        ratio, left = before / after, (1 - after) / (1 - before)
        a = math.sqrt(after) * (1 - ratio) / (1 - before)
        found.append((a, math.sqrt(ratio) * left, left * (1 - ratio)))
    return found


def kl(u: Tensor, signal: float | Tensor) -> Tensor:
    """KL(N(sqrt(signal) u, 1 - signal) | N(0, 1)) of each sample, (B,), of u (B, width)."""
    share = torch.as_tensor(signal, dtype=u.dtype, device=u.device)
    return (share * u.square() - share - torch.log1p(-share)).sum(-1) / 2
