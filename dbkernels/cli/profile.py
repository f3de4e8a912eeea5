"""`python -m dbkernels profile`."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from dbkernels.cli.device import pick_device
from dbkernels.cli.shape import FamilyName, preset
from dbkernels.cli.train import DEFAULT_WEIGHTING
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.memory.measure import CATEGORIES, measure_peak
from dbkernels.ops.rung import Keep
from dbkernels.training.data import ImageData
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer import Trainer, TrainerConfig

WARM_UP_STEPS = 2  # the first step makes the optimizer's state, the second is steady


@dataclass(frozen=True)
class Profile:
    """Measure one training step: peak bytes by category and seconds, for numbers of blocks."""

    family: FamilyName = "vit"
    """vit classifies images; dit generates them."""
    preset: str = "digits"
    """Sizes of the model; vit: cifar100, digits; dit: S/2, B/2, L/2, XL/2, digits."""
    batch: int = 128
    """Samples of a step; made up, of the preset's shape."""
    num_blocks: str = "1,2,3,4,6"
    """Numbers of blocks with commas between; 1 is end to end."""
    keep: Keep = "none"
    """What a layer's backward computes again instead of keeping it: more saves more memory."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    steps: int = 5
    """Steps that are timed, of every block."""
    device: str = "auto"
    """auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    json: bool = False
    """Print one JSON object a line instead of a table."""

    def run(self) -> None:
        if self.batch < 1 or self.steps < 1:
            raise ValueError(
                f"batch and steps must be at least 1, got batch {self.batch} and steps {self.steps}"
            )
        device = pick_device(self.device)
        rows = [self._row(count, device) for count in self._counts()]
        if self.json:
            for row in rows:
                print(json.dumps(row))
        else:
            Console().print(_table(rows))

    def _counts(self) -> list[int]:
        try:
            return [int(count) for count in self.num_blocks.split(",")]
        except ValueError:
            raise ValueError(
                f"num_blocks must be whole numbers with commas between, got {self.num_blocks}"
            ) from None

    def _row(self, num_blocks: int, device: torch.device) -> dict[str, object]:
        model = replace(preset(self.family, self.preset), keep=self.keep)
        config = RunConfig(
            family=self.family,
            model=model,
            data="made up",
            weighting=DEFAULT_WEIGHTING[self.family],
            label_drop=0.0,
            mirror=False,
            shift=0,
            partition=PartitionConfig(num_blocks=num_blocks),
            prior=LogNormal(),
            trainer=TrainerConfig(steps=10**6, batch_size=self.batch, autocast=self.autocast),
        )
        shape = (self.batch, model.channels, model.image_size, model.image_size)
        trainer = config.trainer_on(device, ImageData(*_made_up(shape, model.num_classes)))
        return {"num_blocks": num_blocks, **profile_trainer(trainer, self.steps)}


def profile_trainer(trainer: Trainer, steps: int) -> dict[str, object]:
    """Peak bytes of the costliest block's step, and median seconds of a step and of a sweep.

    Args:
        trainer:  with steps left; it moves on by a few of each block
        steps:    that are timed, of every block
    """
    optimizers = [part.optimizer for part in trainer.parts.values()]
    peaks, seconds = [], []
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        for _ in range(WARM_UP_STEPS):
            step()
        seconds.append(statistics.median(_timed(step, trainer.device) for _ in range(steps)))
    for block in trainer.blocks:
        step = partial(trainer.step_block, block)
        peaks.append(measure_peak(step, model=trainer.models, optimizers=optimizers))
    worst = max(peaks, key=lambda peak: peak.total_bytes)
    return {
        "device": trainer.device.type,
        "peak_bytes": worst.total_bytes,
        "by_category": worst.by_category,
        "saved_bytes": max(peak.saved_bytes for peak in peaks),
        "allocated_bytes": worst.allocated_bytes,
        "reserved_bytes": worst.reserved_bytes,
        "at": worst.at,
        "seconds_per_step": statistics.fmean(seconds),
        "seconds_per_sweep": sum(seconds),
    }


def _timed(step: Callable[[], object], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    begin = time.perf_counter()
    step()
    synchronise()
    return time.perf_counter() - begin


def _made_up(shape: tuple[int, ...], num_classes: int):
    random = torch.Generator().manual_seed(0)
    images = torch.randn(shape, generator=random).numpy()
    labels = torch.randint(num_classes, shape[:1], generator=random)
    return images, labels, num_classes


def _table(rows: list[dict[str, object]]) -> Table:
    """A column for each number of blocks, so that the table stays narrow."""
    table = Table(title="one training step", show_edge=False)
    table.add_column("number of blocks")
    for row in rows:
        table.add_column(str(row["num_blocks"]), justify="right")
    sizes = {"peak": [row["peak_bytes"] for row in rows]}
    for name in CATEGORIES:
        sizes[f"  {name.replace('_', ' ')}"] = [row["by_category"][name] for row in rows]
    sizes["kept for backward"] = [row["saved_bytes"] for row in rows]
    for name, values in sizes.items():
        table.add_row(f"{name}, MiB", *(f"{value / 2**20:.1f}" for value in values))
    for name in ("step", "sweep"):
        times = [f"{row[f'seconds_per_{name}'] * 1e3:.1f}" for row in rows]
        table.add_row(f"time of a {name}, ms", *times)
    return table
