"""Contrastive Forward-Forward: every layer brings images of one class together.

    f    = mean over patches of layer_l(stop_gradient(x_(l-1))), at length 1, of two views
    s_ij = min(f_i f_j + m_l, 1) of one class, f_i f_j of two, both over TEMPERATURE
    loss = mean over i of the mean over j of i's class, j != i, of log sum_(k != i) exp s_ik - s_ij

then a linear head on the last layer's mean patch token. HosseinAghagol/ContrastiveFF,
`main_CFF.py`, with the supervised contrastive loss of Khosla et al. 2020 (arXiv:2004.11362). Its
margins m_l go evenly from the first layer's to the last one's.

Decisions. Published, the head is trained after all layers, for a twelfth of their epochs. Here it
is one more block: with `order="sequential"` it comes last too, and with the trainer's shuffled
order it follows the layers; it has as many updates as each of them. A view is what `augment` makes
of the batch with a draw of its own. Two views of an image have to differ, so they are shifted in a
study too, where no other row may be.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.baseline import Baseline, Parts, Sizes, purpose
from baselines.vit_parts import ClassToken, Head, Plain
from dbkernels.data.augment import shift
from dbkernels.data.images import Batch, Data
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block

TEMPERATURE = 0.15
MARGINS = 0.4, 0.1  # of the first and of the last layer


class Contrastive(Baseline):
    """A block for each layer, and one for the head.

    Args:
        augment:  (batch, draw) -> a view of the batch; None moves images by up to an eighth
    The others are those of `Baseline`.
    """

    name = "contrastive forward-forward"
    networks = (ViTConfig,)

    def __init__(
        self,
        data: Data,
        seed: int,
        sizes: Sizes,
        *,
        augment: Callable[[Batch, Draw], Batch] | None = None,
    ):
        super().__init__(data, seed, sizes)
        self.augment = augment or partial(shift, pixels=max(self.image_shape[1] // 8, 1))

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        vit = ViT(sizes)
        parts = [nn.ModuleDict({"layer": Plain(layer)}) for layer in vit.layers]
        parts[0]["stem"] = ClassToken(vit)
        parts.append(nn.ModuleDict({"head": Head(sizes)}))
        L = sizes.depth
        # of two views each; the head's step runs all layers on one
        self.again = (L * (L - 1) + L) / (L + 1)
        self.margins = torch.linspace(*MARGINS, L, dtype=torch.float64).tolist()
        return Parts(parts, independent=False).blocks()

    def features(self, index: int, image: Tensor) -> Tensor:
        """Mean patch token after a layer, (B, D) float32; those before it have no gradient."""
        parts = self.model.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and index == 0):
            x = parts[0]["stem"](image)
            for part in parts[:index]:
                x = part["layer"](x)
        return parts[index]["layer"](x)[:, 1:].float().mean(1)

    def logits(self, image: Tensor) -> Tensor:
        """Of the head, (B, C); the layers have no gradient."""
        last = len(self.model.layers) - 1
        with torch.no_grad():
            features = self.features(last - 1, image)
        return self.model.layers[last]["head"](features)

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        if block.index == len(self.margins):
            return F.cross_entropy(self.logits(batch["image"]), batch["label"])
        views = [self.augment(batch, purpose(draw, k))["image"] for k in range(2)]
        features = self.features(block.index, torch.cat(views))
        label = batch["label"].repeat(2)
        return supervised_contrast(features, label, self.margins[block.index])

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        return self.logits(batch["image"]).softmax(-1)


def supervised_contrast(features: Tensor, label: Tensor, margin: float) -> Tensor:
    """Loss () of features (N, D) with labels (N,), each of which at least two samples have."""
    features = F.normalize(features)
    cosine = features @ features.T
    same, itself = label == label[:, None], torch.eye(len(label), device=label.device).bool()
    score = torch.where(same, (cosine + margin).clamp(max=1), cosine) / TEMPERATURE
    score = score.masked_fill(itself, -torch.inf)
    pulled = same & ~itself
    log_share = score.log_softmax(1).masked_fill(~pulled, 0)
    return -(log_share.sum(1) / pulled.sum(1)).mean()
