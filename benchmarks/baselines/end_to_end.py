"""The networks trained end to end by cross-entropy, which every other row is measured against.

    vision transformer   CE(head(layers([class token, patches])[0]), y)
    CNN                  CE(read_out(z_T), y), through all steps of equation 3 of NoProp-DT

Published: 60.25 % on CIFAR-100 beside DiffusionBlocks on the transformer, 47.80 % for the CNN.

Decisions. The class token stands where DiffusionBlocks has z, so tokens and layers are the same;
the layers' condition is zero. What NoProp's authors call back-propagation is taken to be their
answer's own steps, differentiated, with the nets that NoProp-DT has.
"""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from baselines.baseline import Baseline, CNNConfig, Parts
from baselines.noprop_dt import NoPropDT
from baselines.vit_parts import ClassToken, Head, Plain
from dbkernels.data.images import Batch
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block


class EndToEndViT(Baseline):
    """One block of all layers, and the head."""

    name = "end to end"
    networks = (ViTConfig,)

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        vit = ViT(sizes)
        model = Parts(list(map(Plain, vit.layers)), independent=True)
        model.stem, model.head = ClassToken(vit), Head(sizes)
        return model.blocks(1)

    def logits(self, image: Tensor) -> Tensor:
        """(B, C) float32."""
        x = self.model.stem(image)
        for layer in self.model.layers:
            x = layer(x)
        return self.model.head(x[:, 0]).float()

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return F.cross_entropy(self.logits(batch["image"]), batch["label"])

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.logits(batch["image"]).softmax(-1)


class Checkpointed(EndToEndViT):
    """The same block, whose backward computes each layer again: other memory, the same numbers."""

    name = "end to end, checkpointed"

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        return super().make(replace(sizes, recompute="layer"))


class EndToEndCNN(NoPropDT):
    """One block of all nets of `NoPropDT`."""

    name = "end to end"
    networks = (CNNConfig,)

    def with_ends(self, model: Parts, num_blocks: int | None = None) -> DiffusionBlocks:
        return super().with_ends(model, 1)

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return F.cross_entropy(self.last_logits(batch, draw), batch["label"])
