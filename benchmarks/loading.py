"""How long training steps wait for images that are decoded, by the number of workers.

    python benchmarks/loading.py --workers 0 1 2

One row is one number of workers. A folder of JPEGs of 256 pixels is made where none is given. The
step trains a ViT on them; with `--asleep-ms` it sleeps instead, as a host does whose GPU computes.
A step *waits* while it reads samples, or while it asks workers for them.
"""

import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter, sleep

import numpy as np
import torch
from machine import machine
from PIL import Image
from program import Known, Program, called, main
from show import Row
from torch import Tensor

from dbkernels.data.images import Batch, ImageData, open_data
from dbkernels.models.vit import ViT
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.pending import Pieces
from dbkernels.training.trainer import Trainer

CLASSES = 4  # of the folder that is made
QUALITY = 90  # of its JPEGs
WARM_UP = 4  # steps that are not timed, in which workers begin
PATCH = 16  # pixels
NUM_BLOCKS = 3


@dataclass(frozen=True)
class Options(Program):
    """Time the steps of a ViT on a folder of images, and how long they wait for these."""

    workers: tuple[int, ...] = (0, 1, 2)
    folder: Path | None = None  # of one folder a class; one that is empty or missing is filled
    images: int = 512  # that are made
    pixels: int = 256  # of their sides
    batch: int = 32
    dim: int = 256  # of the ViT
    depth: int = 12
    asleep_ms: float = 0.0  # sleep so long instead of training
    rounds: int = 20  # steps that are timed

    def __post_init__(self):
        self.require_positive("images", "batch", "depth", "threads")
        self.require_positive("rounds", least=2)
        self.require_positive("asleep_ms", least=0)
        for name, step in (("pixels", PATCH), ("dim", 64)):
            if (value := getattr(self, name)) < step or value % step:
                raise ValueError(f"{name} must be a multiple of {step}, got {value}")
        for count in self.workers:
            if count < 0:
                raise ValueError(f"workers must be at least 0, got {count}")

    def key_of(self, workers: int) -> Row:
        """What a row is known by."""
        work = f", asleep for {self.asleep_ms:g} ms" if self.asleep_ms else ""
        preset = f"of {self.depth} layers of {self.dim}, {self.pixels} pixels{work}"
        about = {"family": "vit", "preset": preset, "batch": self.batch, "dtype": "float32"}
        return {"suite": "loading", **about, "num_blocks": NUM_BLOCKS, "workers": workers}

    def wanted(self) -> list[Row]:
        return [self.key_of(count) for count in self.workers]

    def tables(self, known: Known) -> Iterator[Iterable[Row]]:
        todo = [count for count in self.workers if known.lacks(self.key_of(count))]
        if todo:
            yield self._rows(todo)

    def _rows(self, todo: list[int]) -> Iterator[Row]:
        about = machine(self.on) | {"command": called()}
        made = nullcontext(self.folder) if self.folder else tempfile.TemporaryDirectory()
        with made as folder:
            make_images(Path(folder), self.images, self.pixels)
            data = open_data(folder)
            for count in todo:
                yield self.key_of(count) | self._measured(data, count) | about

    def _measured(self, data: ImageData, workers: int) -> Row:
        torch.manual_seed(0)
        sizes = {"dim": self.dim, "depth": self.depth, "num_heads": self.dim // 64}
        config = ViT.preset("cifar100").resized(sizes)
        channels, side, _ = data.image_shape
        config = replace(config, mlp_hidden=4 * self.dim, image_size=side, patch=PATCH)
        config = replace(config, channels=channels, num_classes=data.num_classes)
        blocks = DiffusionBlocks(ViT(config), num_blocks=NUM_BLOCKS).to(self.on)
        objective = asleep(self.asleep_ms / 1e3) if self.asleep_ms else None
        steps = {"steps": WARM_UP + self.rounds, "batch_size": self.batch, "workers": workers}
        trainer = Trainer(blocks, data, objective=objective, **steps)
        samples = trainer.samples = Waiting(trainer.samples)
        times, waits = [], []
        for _ in range(WARM_UP + self.rounds):
            begin, before = perf_counter(), samples.seconds
            trainer.step_block(trainer.next_block())
            times.append(perf_counter() - begin)
            waits.append(samples.seconds - before)
        trainer.close()
        times, waits = times[WARM_UP:], waits[WARM_UP:]
        return {
            "step_ms": 1e3 * statistics.median(times),
            "wait_ms": 1e3 * statistics.mean(waits),
            "share": sum(waits) / sum(times),
            "samples_per_second": self.batch * len(times) / sum(times),
        }


class Waiting:
    """The samples of a trainer, and the time that steps have waited for them."""

    def __init__(self, samples: object):
        self._samples, self.seconds = samples, 0.0
        self.data, self.close, self.place = samples.data, samples.close, samples.place

    def of_step(self, block: int, step: int, put: Callable[[Tensor], Tensor]) -> Pieces:
        found = self._timed(lambda: self._samples.of_step(block, step, put))

        def pieces(size: int) -> Iterator[Batch]:
            every = found(size)
            while (piece := self._timed(lambda: next(every, None))) is not None:
                yield piece

        return pieces

    def _timed(self, read: Callable[[], object]) -> object:
        begin = perf_counter()
        found = read()
        self.seconds += perf_counter() - begin
        return found


def asleep(seconds: float) -> Callable[..., Tensor]:
    """An objective whose step takes so long, and no processor."""

    def objective(blocks: DiffusionBlocks, block: object, batch: Batch, draw: object) -> Tensor:
        sleep(seconds)
        return sum(p.sum() for p in blocks.of(block).layers[block.layers[0]].parameters()) * 0

    return objective


def make_images(folder: Path, count: int, pixels: int) -> None:
    """Fill a folder that has nothing with JPEGs, smooth but for some noise, in a few classes."""
    if folder.exists() and any(folder.iterdir()):
        return
    random = np.random.default_rng(0)
    for index in range(count):
        place = folder / str(index % CLASSES)
        place.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize((pixels, pixels), Image.Resampling.BICUBIC)
        noisy = np.asarray(smooth) + random.normal(0, 8, (pixels, pixels, 3))
        image = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        image.save(place / f"{index:06}.jpg", quality=QUALITY)


if __name__ == "__main__":
    main(Options)
