"""Forward-Forward on the vision transformer: every layer tells true labels from others.

    x_l  = normalise(layer_l(stop_gradient(x_(l-1)))),   over all tokens and features of a sample
    g_l  = mean over features of (mean over patches of layer_l(...))**2
    loss = mean softplus(THRESHOLD - g_l(x, y)) and softplus(g_l(x, other) - THRESHOLD)

Hinton 2022 (arXiv:2212.13345); on a transformer as in HosseinAghagol/ContrastiveFF, `main_FF.py`,
which the published comparison with DiffusionBlocks adapted (7.85 % on CIFAR-100). One more token
tells the label, and the goodness leaves it out. All classes are tried on a test image, and the one
whose goodness in the last layer is greatest answers; probabilities are its softmax.

Decisions. Published, a label is a patch with one bright pixel, drawn for each class, so that two
of more classes than a patch has pixels can be the same; here its patch has a pixel for each class,
and a map of its own that the first layer's step moves. The goodness is that of the last layer
alone, as published; the sum over all but the first layer is Hinton's. Negative labels are uniform
over the others. `symba=True` has the loss softplus(g(x, other) - g(x, y)) of Lee & Song 2023
(arXiv:2303.08418) with alpha = 1, which the same code offers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines.baseline import Baseline, Parts, Sizes
from baselines.vit_parts import LabelToken, Plain
from dbkernels.data.images import Batch, Data
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block

THRESHOLD = 2.0


class ForwardForward(Baseline):
    """A block for each layer, whose loss is of its goodness.

    Args:
        symba:  whether the loss compares the two goodnesses with each other
    The others are those of `Baseline`.
    """

    name = "forward-forward"
    networks = (ViTConfig,)

    def __init__(self, data: Data, seed: int, sizes: Sizes, *, symba: bool = False):
        self.symba = symba
        super().__init__(data, seed, sizes)
        self.forwards = self.num_classes

    def make(self, sizes: ViTConfig) -> DiffusionBlocks:
        vit = ViT(sizes)
        parts = [nn.ModuleDict({"layer": Plain(layer)}) for layer in vit.layers]
        parts[0]["stem"] = LabelToken(vit)
        # of two samples each, a true and another label
        self.again = sizes.depth - 1
        return Parts(parts, independent=False).blocks()

    def goodness(self, index: int, image: Tensor, label: Tensor) -> Tensor:
        """Of a layer, (B,) float32; the layers before it have no gradient."""
        parts = self.model.layers
        with torch.set_grad_enabled(torch.is_grad_enabled() and index == 0):
            x = parts[0]["stem"](image, label)
            for part in parts[:index]:
                x = normalised(part["layer"](x))
        return goodness(parts[index]["layer"](x))

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        image, label = batch["image"], batch["label"]
        labels = torch.cat([label, other_labels(label, self.num_classes, draw)])
        g = self.goodness(block.index, torch.cat([image, image]), labels)
        return contrast(*g.chunk(2), symba=self.symba)

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        image, last = batch["image"], len(self.model.layers) - 1
        labels = torch.arange(self.num_classes, device=image.device)
        # a class at a time: the memory is that of one forward
        found = [self.goodness(last, image, label.expand(len(image))) for label in labels]
        return torch.stack(found, dim=1).softmax(-1)


def goodness(x: Tensor) -> Tensor:
    """Mean square of the mean patch token, (B,) float32, of x (B, T + 1, D); not of the first."""
    return x[:, 1:].float().mean(1).square().mean(1)


def normalised(x: Tensor) -> Tensor:
    """x (B, T, D), each sample at length 1."""
    return F.normalize(x.flatten(1)).view_as(x)


def contrast(g_true: Tensor, g_other: Tensor, *, symba: bool) -> Tensor:
    """Loss () of the goodness of true and of other labels, (B,) each."""
    if symba:
        return F.softplus(g_other - g_true).mean()
    return F.softplus(torch.cat([THRESHOLD - g_true, g_other - THRESHOLD])).mean()


def other_labels(label: Tensor, num_classes: int, draw: Draw) -> Tensor:
    """Labels (B,) int64 that are uniform over the classes but for each sample's own."""
    numbers = uniforms(draw, len(label), device=label.device)
    further = (numbers * (num_classes - 1)).ceil().long()  # 1 to num_classes - 1
    return (label + further) % num_classes
