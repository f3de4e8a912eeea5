"""`python -m dbkernels evaluate`."""

import json
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from rich import box
from rich.table import Column, Table
from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.cli.table import Row, show
from dbkernels.data.formats import MissingSplit
from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Data
from dbkernels.settings import MOST_SEED, check_number
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig
from dbkernels.training.together import Start

SPREAD = "spread"  # name of the row of standard deviations


@dataclass(frozen=True)
class Evaluate:
    """Evaluate trained runs on held-out data: losses by block, and accuracy after every step."""

    run_dirs: Annotated[
        Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(required)"),
    ]
    """Directories of runs; those that differ by their seed alone also give a mean and a spread, the
    standard deviation."""
    data: str = ""
    """Data to read, as for train; empty takes the run's own."""
    convert: Literal["run", Convert] = "run"
    """Channels of a folder's images, as for train; run is as the run had it."""
    split: Literal["test", "train"] = "test"
    """Which split to read."""
    levels: int = 3
    """Noise levels from which a classifier answers; each is one evaluation of one block."""
    start: Start = "zero"
    """Where a classifier's steps start: zero, or noise, as in the paper."""
    starts: int = 1
    """Starts from noise whose probabilities are averaged."""
    weights: Literal["average", "last"] = "average"
    """The moving average of the weights where the run kept one, or the last weights."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint of the run."""
    seed: int = 0
    """Seed of the noise."""
    device: str = "auto"
    """auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    json: bool = False
    """Print one JSON object a line instead of a table."""

    def run(self) -> None:
        if not self.run_dirs:
            raise ValueError("run_dirs must name at least one run, got none")
        check_number("seed", self.seed, 0, MOST_SEED)
        directory, times = Counter(self.run_dirs).most_common(1)[0]
        if times > 1:
            raise ValueError(f"run_dirs must name each run once, got {directory} twice")
        rows = [self._row(directory) for directory in self.run_dirs]
        show(rows, [_table([*rows, *_over_seeds(rows)])], as_json=self.json)

    def _row(self, directory: Path) -> Row:
        averaged = self.weights == "average"
        config, blocks = load_run(
            directory, which=self.checkpoint, averaged=averaged, device=pick_device(self.device)
        )
        data = self._open(config)
        found = blocks.evaluate(
            data, levels=self.levels, start=self.start, starts=self.starts, seed=self.seed
        )
        setting = asdict(config)
        del setting["trainer"]["seed"]
        row: Row = {
            "run": str(directory),
            "family": config.family,
            "num_blocks": len(blocks),
            "seed": config.trainer.seed,
            "block_losses": found.block_losses,
            "loss_at_sigma_max": found.loss_at_most_noise,
        }
        if found.metrics:
            row |= {"levels": found.levels, **found.metrics}
        return {**row, "setting": json.dumps(setting, sort_keys=True)}

    def _open(self, config: RunConfig) -> Data:
        convert = config.convert if self.convert == "run" else self.convert
        try:
            return config.model.open(self.data or config.data, self.split, convert=convert)
        except MissingSplit as error:
            raise ValueError(
                f"{error}; --data names other data, --split train takes what was trained on"
            ) from None


def _over_seeds(rows: list[Row]) -> list[Row]:
    """For every setting that several runs share, the mean of each figure and its spread."""
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        group = [row for row in rows if row["setting"] == setting]
        if len(group) == 1:
            continue
        runs = {"run": f"mean of {len(group)} seeds", "seed": ""}
        mean, spread = {**group[0], **runs}, {**group[0], "run": SPREAD, "seed": ""}
        for name in {"loss_at_sigma_max", "block_losses", "accuracy"} & mean.keys():
            figures = [row[name] for row in group]
            mean[name], spread[name] = np.mean(figures, axis=0), np.std(figures, axis=0, ddof=1)
        found += [mean, spread]
    return found


def _table(rows: list[Row]) -> Table:
    names, parent = _short_names([str(row["run"]) for row in rows if row["seed"] != ""])
    headings = ["blocks", "seed", "loss of\neach block", "loss at\nsigma_max"]
    if any("accuracy" in row for row in rows):
        headings.append("accuracy after\neach step, %")
    table = Table(
        Column("run", overflow="fold"), *headings, box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0), caption=parent and f"runs of {parent}",
    )  # fmt: skip
    for row in rows:
        digits = ".1g" if row["run"] == SPREAD else ".4g"
        losses = " ".join(f"{loss:{digits}}" for loss in row["block_losses"])
        most_noise, shares = row["loss_at_sigma_max"], row.get("accuracy", ())
        accuracy = " ".join(f"{100 * share:.2f}" for share in shares)
        cells = row["num_blocks"], row["seed"], losses, f"{most_noise:{digits}}", accuracy
        cells = map(str, cells[: len(headings)])
        table.add_row(names.get(row["run"], row["run"]), *cells)
    return table


def _short_names(paths: list[str]) -> tuple[dict[str, str], str]:
    """The paths without the directory that they have in common, and that directory."""
    parents = [os.path.dirname(path) for path in paths]
    absolute = {os.path.isabs(path) for path in paths}
    parent = os.path.commonpath(parents) if len(absolute) == 1 else ""
    return {path: os.path.relpath(path, parent) if parent else path for path in paths}, parent
