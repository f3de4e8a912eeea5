"""One model of the demo: what is trained, on one thread of a process of its own, and what is told.

Models this small gain little from a second thread, and beside a busy process two threads wait for
each other. So two processes train two models at a time.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from answers import accuracy
from report_rows import Row
from torch import Tensor

from dbkernels import DiffusionBlocks, DiT, Draw, LogNormal, Trainer, ViT, measure_peak, open_data
from dbkernels.data.augment import drop_conditions
from dbkernels.training.diffusion_blocks import load_weights

CLASSES = 10
POINTS = 50  # of a line of losses
LEVELS, GUIDANCE = 30, 1.5  # of the sampler
MODELS = {"vit": ViT, "dit": DiT}
# end to end a ViT has the most noise alone and is the ordinary classifier, which is harder to beat
NOISE = {("vit", 1): LogNormal(sigma_min=79.0)}
Told = Callable[[int], None]  # takes how many layers were updated since it was called last


@dataclass(frozen=True)
class Job:
    """A model to train and what to ask of it then.

    family:     vit, or dit
    num_blocks: 1 trains end to end
    seed:       of the weights, the batches and the noise
    steps:      updates of every layer
    per_class:  digits of each class that a DiT generates
    """

    family: str
    num_blocks: int
    seed: int
    steps: int
    per_class: int

    @property
    def updates(self) -> int:
        """Updates of all layers."""
        return self.steps * MODELS[self.family].preset("digits").depth

    def run(self, told: Told) -> tuple[Row, Tensor | None]:
        """Train; the model's row, and the digits that it generates, class after class."""
        torch.set_num_threads(1)
        blocks, row = self._train(told)
        if self.family == "vit":
            return row | classified(blocks), None
        levels, draw = blocks.process.grid(LEVELS, "cdf"), Draw(0, step=0)
        asked = torch.arange(CLASSES).repeat_interleave(self.per_class)
        return row, blocks.sample({"label": asked}, levels, draw, guidance=GUIDANCE)

    def _train(self, told: Told) -> tuple[DiffusionBlocks, Row]:
        torch.manual_seed(self.seed)
        model, is_vit = MODELS[self.family].from_preset("digits"), self.family == "vit"
        noise, augment = NOISE.get((self.family, self.num_blocks)), None
        if not is_vit:
            augment = partial(drop_conditions, share=0.1, unconditional=model.unconditional)
        blocks = DiffusionBlocks(model, self.num_blocks, process=noise)
        trainer = Trainer(
            blocks,
            open_data("digits"),
            steps=self.steps,
            batch_size=64,
            lr=2e-3,
            warmup=20,
            decay="cosine",
            ema=0.0 if is_vit else 0.99,
            augment=augment,
            seed=self.seed,
        )
        row = {"family": self.family, "num_blocks": self.num_blocks, "updates": self.steps}
        row |= followed(trainer, told)
        load_weights(blocks, trainer.tensors().get("ema", {}))
        return blocks, row | memory(trainer)


def followed(trainer: Trainer, told: Told) -> Row:
    """Train to the end; the losses and times of the blocks' steps."""
    losses: list[list[float]] = [[] for _ in trainer.blocks]
    seconds: list[list[float]] = [[] for _ in trainer.blocks]
    while trainer.step < trainer.total_steps:
        block, begin = trainer.next_block(), time.perf_counter()
        losses[block.index].append(trainer.step_block(block)["loss"])
        seconds[block.index].append(time.perf_counter() - begin)
        told(len(block.layers))
    each = [1e3 * statistics.median(times) for times in seconds]
    row: Row = {"loss": [_means(line) for line in losses]}
    return row | {"step_ms": statistics.mean(each), "sweep_ms": sum(each)}


def memory(trainer: Trainer) -> Row:
    """Peak of the costliest block's step, and what its forward leaves; trains a step of each."""
    optimizers = [each for group in trainer.groups.values() for each in group.optimizers]
    about = {"model": trainer.blocks, "optimizers": optimizers}
    steps = [partial(trainer.step_block, block) for block in trainer.blocks]
    peaks = [measure_peak(step, **about) for step in steps]
    saved = max(peak.saved_bytes for peak in peaks)
    return {"peak_bytes": max(peak.total_bytes for peak in peaks), "saved_bytes": saved}


def classified(blocks: DiffusionBlocks) -> Row:
    """How well a classifier answers on digits that it has not seen, from z = 0 and from noise."""
    data = open_data("digits", "test")
    return {
        "accuracy": accuracy(blocks.eval(), data),
        "accuracy_from_noise": accuracy(blocks, data, start="noise"),
        "cross_entropy": blocks.loss_at(data, blocks.process.range.high),
    }


def _means(losses: list[float]) -> list[float]:
    """Means over runs of steps, few enough to store."""
    parts = torch.tensor(losses).split(-(-len(losses) // POINTS))
    return [float(f"{part.mean():.4g}") for part in parts]
