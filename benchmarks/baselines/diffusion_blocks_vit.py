"""DiffusionBlocks on the vision transformer, and the same blocks that are told no noise level.

    loss   = CE(head(denoise_b(z, sigma, image)), y),    z = z0 + sigma noise
    answer = the softmax of the logits after the last of LEVELS Euler steps from z = 0

arXiv:2506.14202, section 5.1: 59.30 % on CIFAR-100. Model, process, weights and overlap are those
that `train vit` has by default, and the answer is that of `evaluate`.

Decisions. Without conditioning the condition of the layers and of the head is zero, so each has one
modulation, which it learns, for all levels. What scales z and joins it to the output by the level
stays: that is the parametrisation of the denoiser, without which a block's target has no scale.
"""

from torch import Tensor, nn

from baselines.baseline import Baseline, Sizes
from dbkernels.data.images import Batch, Data
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block, block_at

LEVELS = 3  # of an answer


class DiffusionBlocksViT(Baseline):
    """Blocks of layers, by the loss of the package.

    Args:
        num_blocks:  at most the depth
    The others are those of `Baseline`.
    """

    name = "diffusion blocks"
    networks = (ViTConfig,)

    def __init__(self, data: Data, seed: int, sizes: Sizes, *, num_blocks: int = 3):
        self.num_blocks = num_blocks
        super().__init__(data, seed, sizes)
        self.levels = self.blocks.process.grid(LEVELS, "cdf")
        # each step runs the layers of one block
        run = sum(len(block_at(self.blocks, level).layers) for level in self.levels)
        self.forwards = run / len(self.model.layers)

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        return DiffusionBlocks(ViT(sizes), self.num_blocks)

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return self.blocks.loss(block, batch, draw)

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.blocks.predictions(batch, self.levels, draw)[-1].float().softmax(-1)


class Unconditioned(DiffusionBlocksViT):
    """The same blocks, to which every level is alike but for the scale of z."""

    name = "diffusion blocks, unconditioned"

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        vit = ViT(sizes)
        vit.condition = Zero(sizes.cond_dim)
        # nothing but their biases meets a condition of zero
        for linear in (*(layer.modulation for layer in vit.layers), vit.modulation.linear):
            linear.weight.requires_grad_(False)
        return DiffusionBlocks(vit, self.num_blocks)


class Zero(nn.Module):
    """A condition that is zero at every level: (B,) -> (B, cond_dim) float32."""

    def __init__(self, cond_dim: int):
        super().__init__()
        self.cond_dim = cond_dim

    def forward(self, c_noise: Tensor) -> Tensor:
        return c_noise.new_zeros(len(c_noise), self.cond_dim)
