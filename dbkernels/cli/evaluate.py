"""`python -m dbkernels evaluate`."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from dbkernels.cli.bits_table import bits_row, bits_tables, compare
from dbkernels.cli.device import pick_device
from dbkernels.cli.losses_table import losses_row, losses_tables
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.table import Row, show
from dbkernels.data.formats import MissingSplit
from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Data
from dbkernels.diffusion.bridges import BridgeName
from dbkernels.models.registry import family_named
from dbkernels.settings import MOST_SEED, check_number
from dbkernels.training.evaluation import SETTINGS, Evaluation
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig, read_config
from dbkernels.training.text_bits import TextEvaluation
from dbkernels.training.together import Start


@dataclass(frozen=True)
class Evaluate:
    """Evaluate trained runs on held-out data: losses by block, accuracy and calibration after
    every step, or the bits per character of a text."""

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
    samples: int | None = None
    """So many of the data, evenly spaced; None is all images, or 512 windows of a text."""
    levels: int | None = None
    """Noise levels of the sampler, each an evaluation of one block; None is three of a classifier,
    and of a text one for each block, or four of a single block."""
    start: Start | None = None
    """Where a classifier's steps start: zero, or noise, as in the paper; None is zero."""
    starts: int | None = None
    """Starts from noise whose probabilities are averaged; None is one of a classifier, and of a
    text 32, where 0 leaves the sampler out."""
    bridge: BridgeName | None = None
    """How a text's sampler goes on from one level to the next: with the expected row, with the
    likeliest word's, or with that of a drawn word, as None does."""
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
        self._check_use([read_config(directory) for directory in self.run_dirs])
        rows = compare([self._row(directory) for directory in self.run_dirs])
        show(rows, [*losses_tables(rows), *bits_tables(rows)], as_json=self.json)

    @property
    def _given(self) -> Row:
        settings = {name: getattr(self, name) for name in ("levels", "start", "starts", "bridge")}
        return {name: value for name, value in settings.items() if value is not None}

    def _check_use(self, configs: Sequence[RunConfig]) -> None:
        """Refuse a setting that none of the runs has."""
        used = {name for config in configs for name in _settings_of(config)}
        for name, value in self._given.items():
            if name not in used:
                raise ValueError(f"{name} must be left out: no run here has it, got {value}")

    def _row(self, directory: Path) -> Row:
        averaged = self.weights == "average"
        config, blocks = load_run(
            directory, which=self.checkpoint, averaged=averaged, device=pick_device(self.device)
        )
        data = self._open(config)
        setting = asdict(config)
        del setting["trainer"]["seed"]
        row: Row = {
            "run": str(directory),
            "family": config.family,
            "num_blocks": len(blocks),
            "seed": config.trainer.seed,
        }
        with ProgressBar("evaluating", 0, "passes") as shown:

            def told(done: int, total: int) -> None:
                shown.total = total
                shown.step(done, str(directory))

            found: Evaluation | TextEvaluation
            how: dict[str, Any] = {"samples": self.samples, "seed": self.seed, "told": told}
            if config.objective == "conventional":
                found = blocks.evaluate_conventional(data, **how)
            else:
                given = {k: v for k, v in self._given.items() if k in _settings_of(config)}
                found = blocks.evaluate(data, **given, **how)
        if isinstance(found, Evaluation):
            row |= losses_row(found)
        else:
            row |= bits_row(found, config, [len(block.layers) for block in blocks])
        return {**row, "setting": json.dumps(setting, sort_keys=True)}

    def _open(self, config: RunConfig) -> Data:
        convert = config.convert if self.convert == "run" else self.convert
        try:
            return config.model.open(self.data or config.data, self.split, convert=convert)
        except MissingSplit as error:
            raise ValueError(
                f"{error}; --data names other data, --split train takes what was trained on"
            ) from None


def _settings_of(config: RunConfig) -> Sequence[str]:
    """Settings that the evaluation of a run has."""
    return SETTINGS[family_named(config.family).text] if config.objective == "blocks" else ()
