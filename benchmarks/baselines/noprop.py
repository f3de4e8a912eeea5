"""What the three kinds of NoProp share: embeddings of the classes, nets, and the read-out.

    u_y    = row y of E                 fixed one-hot, or learned
    u_hat  = softmax(net(z, image)) E
    answer = softmax(W z + b) of the last z

Li, Teh & Pascanu 2025 (arXiv:2503.24322). Time runs from noise, z_0, to the class, z_1 or z_T.

Decisions. The published best figures have embeddings of the size of an image, which begin as the
most central image of each class; those are not built here. A learned embedding begins with
orthogonal columns and is not brought to unit length. On the vision transformer, where the paper has
no NoProp, a net is the transformer with z in the place of the class token.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from baselines.baseline import Baseline, CNNConfig, Parts, Sizes
from baselines.cnn import CNN
from baselines.vit_parts import ViTNet
from dbkernels.data.images import Data
from dbkernels.settings import check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks

TIME_WIDTH = 64  # of the embedding of the time that the CNN reads


class NoProp(Baseline):
    """One of the kinds of NoProp.

    Args:
        embedding:  width of the learned embeddings; 0 is one-hot vectors that stay as they are
    The others are those of `Baseline`.
    """

    def __init__(self, data: Data, seed: int, sizes: Sizes, *, embedding: int = 20):
        check_number("embedding", embedding, 0)
        self.embedding = embedding
        super().__init__(data, seed, sizes)

    @property
    def width(self) -> int:
        """Of z."""
        return self.embedding or self.num_classes

    def with_ends(self, model: Parts, num_blocks: int | None = None) -> DiffusionBlocks:
        """The blocks of nets, with the embeddings and the read-out that they share."""
        C = self.num_classes
        if self.embedding:
            model.table = nn.Embedding(C, self.width)
            nn.init.orthogonal_(model.table.weight)
        else:
            model.table = nn.Embedding.from_pretrained(torch.eye(C, dtype=torch.float32))
        model.read_out = nn.Linear(self.width, C)
        return model.blocks(num_blocks)

    def net(self, sizes: Sizes, depth: int, outputs: int, *, timed: bool) -> nn.Module:
        """One net of the sizes: (z, image, c) -> (B, outputs); a transformer of so many layers."""
        if isinstance(sizes, CNNConfig):
            cond_dim = TIME_WIDTH if timed else 0
            given = sizes, self.image_shape, self.width, outputs
            return CNN(*given, cond_dim=cond_dim, normed=not timed)
        return ViTNet(replace(sizes, depth=depth), self.width, outputs, timed=timed)

    def embedded(self, label: Tensor) -> Tensor:
        """u_y, (B, width) float32."""
        return self.model.table(label)

    def estimate(self, logits: Tensor) -> Tensor:
        """u_hat, (B, width) float32, of a net's logits (B, C)."""
        return logits.float().softmax(-1) @ self.model.table.weight

    def read_out(self, z: Tensor) -> Tensor:
        """Logits (B, C) of z (B, width)."""
        return self.model.read_out(z)


def square_error(found: Tensor, wanted: Tensor) -> Tensor:
    """Squared distance of each sample, (B,), of (B, width)."""
    return (found - wanted).square().sum(-1)
