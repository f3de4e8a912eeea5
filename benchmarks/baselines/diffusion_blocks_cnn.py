"""DiffusionBlocks on the network of NoProp: as many nets as blocks, each told the noise level.

    z0    = E[y] / |E[y]|,    z = z0 + sigma noise,    p of EDM
    loss  = CE(net_b(p z, image, c(sigma)), y),    D = softmax(net_b(...)) E

arXiv:2506.14202, appendix E.6: 46.88 % on CIFAR-100. Three nets of NoProp-DT with the conditioning
on time of NoProp-CT, gamma 0.1, 1000 Euler steps from noise; there AdamW at 1e-4 in batches of 128.

Decisions. Embeddings are as wide as those of NoProp here, and so is the condition. The loss has no
weights. Each net has its own convolutions and head, the blocks share the embeddings and the first
layers of the condition, and an answer is the logits of the last level.
"""

import torch
from torch import Tensor, nn

from baselines.baseline import Baseline, CNNConfig, Sizes
from baselines.cnn import CNN
from dbkernels.data.images import Batch, Data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models.own_layers import OwnLayers
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block

BLOCKS, GAMMA = 3, 0.1


class DiffusionBlocksCNN(Baseline):
    """A block for each of three nets.

    Args:
        embedding:  width of the embeddings and of the condition
        steps:      levels of an answer
    The others are those of `Baseline`.
    """

    name = "diffusion blocks"
    networks = (CNNConfig,)

    def __init__(
        self, data: Data, seed: int, sizes: Sizes, *, embedding: int = 20, steps: int = 1000
    ):
        check_number("embedding", embedding, 1)
        self.embedding, self.steps = embedding, steps
        super().__init__(data, seed, sizes)
        # each evaluation runs one net of three
        self.forwards = steps / BLOCKS

    def make(self, sizes: CNNConfig) -> DiffusionBlocks:
        C, width = self.num_classes, self.embedding
        nets = [
            CNN(sizes, self.image_shape, width, C, cond_dim=width, normed=True)
            for _ in range(BLOCKS)
        ]
        self.levels = LogNormal().grid(self.steps, "cdf")
        model = OwnLayers(
            Nets(nets, self.image_shape, width, C),
            target=lambda net, batch: batch["label"],
            stem=lambda net, z, batch: net.packed(z, batch["image"]),
            head=lambda net, x, c, batch: net.logits(x),
            dim=width,
            num_classes=C,
            level_as="condition",
        )
        return DiffusionBlocks(model, BLOCKS, process=LogNormal(), weighting="none", gamma=GAMMA)

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return self.blocks.loss(block, batch, draw)

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.blocks.predictions(batch, self.levels, draw, start="noise")[-1].softmax(-1)


class Nets(nn.Module):
    """The nets as layers, which keep the shape of x: z, the image, and room for logits."""

    def __init__(self, nets: list[CNN], image_shape: tuple[int, int, int], width: int, C: int):
        super().__init__()
        self.layers = nn.ModuleList(Packed(net, image_shape, width, C) for net in nets)
        self.num_classes = C

    def packed(self, z: Tensor, image: Tensor) -> Tensor:
        """What a layer reads, (B, width + C H W + classes)."""
        return torch.cat([z, image.flatten(1), z.new_zeros(len(z), self.num_classes)], dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """What a layer left, (B, classes)."""
        return x[:, -self.num_classes :]


class Packed(nn.Module):
    """A net that reads its inputs from one tensor, and writes its logits to the end of it."""

    def __init__(self, net: CNN, image_shape: tuple[int, int, int], width: int, C: int):
        super().__init__()
        self.net, self.image_shape, self.width, self.num_classes = net, image_shape, width, C

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        z, image = x[:, : self.width], x[:, self.width : -self.num_classes]
        logits = self.net(z, image.unflatten(1, self.image_shape), c)
        return torch.cat([x[:, : -self.num_classes], logits], dim=1)
