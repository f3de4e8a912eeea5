"""How well classifiers answer, by the least noise level of their training and by their start.

A row is several runs that differ by their seed alone. Each answers after every Euler step, from
z = 0, from noise as in the paper, and with the mean of six starts from noise. A run is one of
`train vit` with --num-blocks 3, and its --sigma-min and --seed. With --num-blocks 1 --sigma-min 79
it has the most noise alone and is the ordinary classifier.
"""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import machine
import torch
import tyro
from seeds import over_seeds
from show import Row, show
from tyro.conf import Positional

from dbkernels import DiffusionBlocks, open_data
from dbkernels.data.images import Data
from dbkernels.training.evaluation import batches
from dbkernels.training.run import load_run
from dbkernels.training.together import Start
from dbkernels.whole_file import write_whole

WAYS = {
    "accuracy": {"start": "zero"},
    "accuracy_from_noise": {"start": "noise"},
    "accuracy_of_six": {"start": "noise", "starts": 6},
}
STEPS, BATCH = 3, 256


@dataclass(frozen=True)
class Answers:
    """Compare how runs of a classifier answer on images that they have not seen."""

    runs: Annotated[Positional[tuple[Path, ...]], tyro.conf.arg(metavar="RUN [RUN ...]")]
    """Directories of runs."""
    out: Path | None = None
    """A file of rows to write; without it a table is printed alone."""

    def run(self) -> None:
        command = f"python {shlex.join(['benchmarks/answers.py', *map(str, self.runs)])}"
        about = {"suite": "answers", **machine.machine(torch.device("cpu")), "command": command}
        groups: dict[str, list[Row]] = {}
        for directory in self.runs:
            setting, row = answers(directory)
            groups.setdefault(setting, []).append(row)
        rows = [about | over_seeds(group, tuple(WAYS)) for group in groups.values()]
        if self.out is not None:
            write_whole(self.out, "".join(json.dumps(row) + "\n" for row in rows))
        show(rows)


def answers(directory: Path) -> tuple[str, Row]:
    """The setting of a run, which its seed is not part of, and what it answers."""
    config, blocks = load_run(directory, which="latest", averaged=True, device="cpu")
    data = open_data(config.data, "test", config.model.num_classes)
    setting = asdict(config)
    del setting["trainer"]["seed"]
    row = {
        "data": Path(config.data).stem,
        "batch": config.trainer.batch_size,
        "updates": config.trainer.steps,
        "num_blocks": len(blocks),
        "least": config.prior.sigma_min,
    }
    shares = {name: accuracy(blocks.eval(), data, **way) for name, way in WAYS.items()}
    return json.dumps(setting, sort_keys=True), row | shares


def accuracy(
    blocks: DiffusionBlocks, data: Data, *, start: Start = "zero", starts: int = 1
) -> list[float]:
    """The share of right answers after each step."""
    grid, right = blocks.process.grid(STEPS, "cdf"), torch.zeros(STEPS, dtype=torch.int64)
    for batch, draw in batches(data, BATCH, "cpu"):
        steps = blocks.predictions(batch, grid, draw, start=start, starts=starts)
        right += torch.stack([(step.argmax(-1) == batch["label"]).sum() for step in steps])
    return (right / len(data)).tolist()


if __name__ == "__main__":
    try:
        tyro.cli(Answers).run()
    except ValueError as error:
        sys.exit(str(error))
