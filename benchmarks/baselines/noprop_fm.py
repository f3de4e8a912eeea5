"""NoProp-FM: one net that is told the time and gives the velocity from noise to the class.

    z_t  = t u_y + (1 - t) z_0,    z_0 ~ N(0, 1),    t ~ U(0, 1)
    loss = |v(z_t, image, t) - (u_y - z_0)|**2 + CE(read_out(z_t + (1 - t) v), y)

Li, Teh & Pascanu 2025 (arXiv:2503.24322), section on flow matching: 37.57 % on CIFAR-100. It is
not block-wise. An image is answered by Euler's steps of dz = v dt, from z_0 ~ N(0, 1).

Decisions. The net gives v itself, without a softmax. Published, the second term is there where
embeddings are learned; here always, for nothing else trains the read-out.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines.baseline import Sizes, purpose
from baselines.noprop import square_error
from baselines.noprop_ct import LEVEL, TIME, Timed
from dbkernels.data.images import Batch
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block


class NoPropFM(Timed):
    """One block."""

    name = "noprop-fm"

    def make(self, sizes: Sizes) -> DiffusionBlocks:
        return self.with_ends(self.one_net(sizes, self.width))

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        label = batch["label"]
        u = self.embedded(label)
        time = uniforms(purpose(draw, TIME), len(u), device=u.device).float()
        start, t = normals(purpose(draw, LEVEL), *u.shape, u.device), time[:, None]
        z = t * u + (1 - t) * start
        v = self.output(z, batch["image"], time).float()
        reached = self.read_out(z + (1 - t) * v)
        return square_error(v, u - start).mean() + F.cross_entropy(reached, label)

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        image, steps = batch["image"], int(self.forwards)
        z = normals(draw, len(image), self.width, image.device)
        for k in range(steps):
            time = torch.full((len(z),), k / steps, dtype=torch.float32, device=z.device)
            z = z + self.output(z, image, time).float() / steps
        return self.read_out(z).softmax(-1)
