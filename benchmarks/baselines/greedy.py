"""Greedy training of layers, each by the cross-entropy of a linear head of its own.

    x_l  = layer_l(stop_gradient(x_(l-1)))
    loss = CE(head_l(x_l[0]), y)

Bengio et al. 2006, and Belilovsky et al. 2019 (arXiv:1812.11446) with layers trained side by side,
as the trainer's shuffled order has it; `order="sequential"` finishes one after another. It is the
plainest way to train without a gradient between layers, so a block-wise method has to beat it.

Decisions. A head is a layer norm and a linear map, and reads the class token; the first layer's
step moves the stem. The head of the last layer answers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.baseline import Baseline, Parts
from baselines.vit_parts import ClassToken, Head, Plain
from dbkernels.data.images import Batch
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block


class Greedy(Baseline):
    """A block for each layer, whose loss is the cross-entropy of its own head, in nats."""

    name = "greedy"
    networks = (ViTConfig,)

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        vit = ViT(sizes)
        parts = [
            nn.ModuleDict({"layer": Plain(layer), "head": Head(sizes)}) for layer in vit.layers
        ]
        parts[0]["stem"] = ClassToken(vit)
        self.again = (sizes.depth - 1) / 2
        return Parts(parts, independent=False).blocks()

    def logits(self, index: int, image: Tensor) -> Tensor:
        """Of the head of a layer, (B, C); the layers before it have no gradient."""
        parts = self.model.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and index == 0):
            x = parts[0]["stem"](image)
            for part in parts[:index]:
                x = part["layer"](x)
        return parts[index]["head"](parts[index]["layer"](x)[:, 0])

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return F.cross_entropy(self.logits(block.index, batch["image"]).float(), batch["label"])

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.logits(-1 + len(self.model.layers), batch["image"]).float().softmax(-1)
