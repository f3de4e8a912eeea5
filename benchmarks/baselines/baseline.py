"""What every baseline offers, so that a study has each as a row of one table.

    row = BASELINES["forward-forward"](data, seed, sizes)
    Trainer(row.blocks, data, objective=row.objective, steps=updates).run()
    probabilities = row.answer(batch, draw)

`Trainer` gives every block as many updates as `steps` says, each of `batch_size` samples. So each
layer of each baseline has as many as the layers of the network that is trained end to end; what
several blocks share has one from each block's step.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch, Data
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.models.vit import ViTConfig
from dbkernels.ops.philox import Draw, stream_seed
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.evaluation import batches
from dbkernels.training.partition import Block


@dataclass(frozen=True)
class CNNConfig:
    """Sizes of the network of NoProp; see `cnn.CNN`."""

    channels: tuple[int, int, int] = (32, 64, 128)
    """Of the three convolutions."""
    hidden: int = 256
    """Width of the branches; even."""
    dropout: float = 0.2
    """Share of each convolution's output that is left out in training."""


Sizes = ViTConfig | CNNConfig


class Parts(nn.Module):
    """Parts that a block each trains, in the shape in which `DiffusionBlocks` asks for a model.

    Its noise levels belong to nothing: an objective brings its own noise. Whatever else a baseline
    has as a child of it, all blocks share, and the step of each updates it.

    Args:
        parts:        one of each block
        independent:  whether the step of a block reads no part of another
    """

    target_parts: ClassVar[tuple[str, ...]] = ()
    stem_and_head: ClassVar[tuple[str, ...]] = ()
    sigma_data = 0.5
    prediction = EDM(sigma_data)

    def __init__(self, parts: Sequence[nn.Module], *, independent: bool):
        super().__init__()
        self.layers, self.independent = nn.ModuleList(parts), independent

    def blocks(self, num_blocks: int | None = None) -> DiffusionBlocks:
        """One block for each part; or so many, among which the parts are dealt out in order."""
        count = len(self.layers) if num_blocks is None else num_blocks
        return DiffusionBlocks(self, count, process=LogNormal(), weighting="none", gamma=0.0)


class Baseline:
    """A network, how it is trained, and how it answers.

    name:      of the row, with that of the network
    blocks:    for the trainer
    forwards:  passes of a test image, where one runs every layer once
    again:     layers that an update runs without a gradient, mean over all updates. A loop that
               trains all layers on one batch need not run them: its times are shorter by so much

    Args:
        data:   images (C, H, W), H = W, and their labels, as `open_data` gives
        seed:   of the first weights
        sizes:  of the network, whose kind they choose; image size, channels and classes are those
                of the data
    Raises:
        ValueError: the data is something else or has one class, or the sizes do not fit it or are
            of a network that this baseline does not train.
    """

    name: ClassVar[str]
    networks: ClassVar[tuple[type, ...]] = (ViTConfig, CNNConfig)
    blocks: DiffusionBlocks
    forwards: float = 1
    again: float = 0

    def __init__(self, data: Data, seed: int, sizes: Sizes):
        self.image_shape, self.num_classes = _shape_of(data)
        if not isinstance(sizes, self.networks):
            known = " or ".join(kind.__name__ for kind in self.networks)
            raise ValueError(f"sizes of {self.name} must be {known}, got {type(sizes).__name__}")
        if isinstance(sizes, ViTConfig):
            sizes = sizes.fitted(data)
        with seeded(torch.device("cpu"), seed):
            self.blocks = self.make(sizes)

    def make(self, sizes: Sizes) -> DiffusionBlocks:
        """The blocks; torch's own generator draws their first weights."""
        raise NotImplementedError

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        """Loss of one block, () float32, mean over the batch."""
        raise NotImplementedError

    def probabilities(self, batch: Batch, draw: Draw) -> Tensor:
        """What `answer` gives; the blocks are in evaluation mode."""
        raise NotImplementedError

    @property
    def model(self) -> nn.Module:
        """What the blocks are of."""
        return self.blocks.model

    def objective(self, blocks: DiffusionBlocks, block: Block, batch: Batch, draw: Draw) -> Tensor:
        """Loss of one block for the trainer, () float32.

        What random layers draw in it is a function of the step, and depends on how a batch is cut.

        Raises:
            ValueError: the batch has not the images and labels of the data that it is made for.
        """
        self._check(batch)
        with seeded(batch["image"].device, draw.seed, draw.step, draw.sample):
            return self.loss(block, batch, draw)

    @torch.no_grad()
    def answer(self, batch: Batch, draw: Draw) -> Tensor:
        """Probabilities of the classes, (B, C) float32, of images (B, C, H, W).

        Args:
            batch:  of which labels are not read
            draw:   names the noise of answers that begin with some
        """
        was_training = self.blocks.training
        self.blocks.eval()
        try:
            return self.probabilities(batch, draw)
        finally:
            self.blocks.train(was_training)

    def accuracy(self, data: Data, *, batch_size: int = 256, seed: int = 0) -> float:
        """Share of the data whose most probable class is its label."""
        right = 0
        for batch, draw in batches(data, batch_size, self.blocks.device, seed=seed):
            right += int((self.answer(batch, draw).argmax(-1) == batch["label"]).sum())
        return right / len(data)

    def _check(self, batch: Batch) -> None:
        expected = {"image": self.image_shape, "label": ()}
        got = {name: tuple(batch[name].shape[1:]) for name in expected if name in batch}
        if got != expected:
            raise ValueError(f"a batch must have {expected} of each sample, got {got}")
        image, label = batch["image"], batch["label"]
        if not image.is_floating_point() or label.dtype != torch.int64:
            raise ValueError(
                "images must be floating point and labels torch.int64, got "
                f"{image.dtype} and {label.dtype}"
            )


def purpose(draw: Draw, number: int) -> Draw:
    """A draw of the same step and samples whose numbers are those of one purpose alone."""
    return replace(draw, seed=stream_seed(draw.seed, number))


@contextmanager
def seeded(device: torch.device, *key: int) -> Iterator[None]:
    """Have torch's own generators draw the stream of a key, and go on as before at the end."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(stream_seed(*key))
        yield


def _shape_of(data: Data) -> tuple[tuple[int, int, int], int]:
    """Image shape and number of classes."""
    shape, classes = (getattr(data, name, None) for name in ("image_shape", "num_classes"))
    if shape is None or classes is None:
        raise ValueError(
            f"data must be images with labels, as open_data gives, got {type(data).__name__}"
        )
    if len(shape) != 3 or shape[1] != shape[2]:
        raise ValueError(f"images must be (C, H, W) with H = W, got {tuple(shape)}")
    if classes < 2:
        raise ValueError(f"data must have 2 classes or more, got {classes}")
    return tuple(shape), classes
