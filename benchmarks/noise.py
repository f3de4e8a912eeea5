"""What blocks of a generator of digits are worth on each kind of noise, beside end to end.

Every competitor is a command that a user would type: `dbkernels train`, then digits are drawn and a
small classifier compares them with real ones. A run that is there is not trained again, and one
that was cut short goes on. All have the same number of updates of every layer; what all blocks
share gets an update from each block's step.

    python benchmarks/noise.py --runs DIR --out benchmarks/results/NAME/noise.jsonl
"""

import json
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import machine
import torch
import tyro
from judge import Judge, judge_of
from seeds import over_seeds
from show import Row, show

from dbkernels import Draw
from dbkernels.diffusion.prediction import PREDICTIONS
from dbkernels.diffusion.samplers import SAMPLERS, Sampler
from dbkernels.training.run import load_run
from dbkernels.whole_file import write_whole

NOISES = [(process, name) for process, names in PREDICTIONS.items() for name in names]
RATE = "--batch-size 64 --lr 2e-3 --warmup 20 --decay cosine --ema 0.99 --label-drop 0.1"
SIZES = ""  # of the model, those of its smallest preset
GUIDANCE = 1.5


class Way(NamedTuple):
    """What is trained, but for its seed."""

    process: str
    prediction: str
    num_blocks: int
    gamma: float  # one block overlaps nothing


@dataclass(frozen=True)
class Noise:
    """Train what is missing, draw digits with every run, and print a table over seeds."""

    runs: Path
    """Directory of the runs."""
    seeds: int = 3
    """Of every competitor."""
    updates: int = 1000
    """Of every layer."""
    blocks: tuple[int, ...] = (1, 3)
    """Numbers of blocks; 1 is end to end."""
    gammas: tuple[float, ...] = (0.05,)
    """Overlaps of several blocks."""
    only: str = ""
    """Process, or the beginning of `process prediction`, of the competitors; empty takes all."""
    sampler: Sampler = "euler"
    """That draws the digits."""
    levels: int = 30
    """Of the sampler, spaced as it needs."""
    per_class: int = 100
    """Digits of each class."""
    processes: int = 2
    """Runs that are trained at a time, one thread each."""
    out: Path | None = None
    """A file of rows to write; without it a table is printed alone."""

    def run(self) -> None:
        wanted = [noise for noise in NOISES if " ".join(noise).startswith(self.only)]
        if not wanted:
            names = ", ".join(map(" ".join, NOISES))
            raise ValueError(f"only must begin one of {names}, got {self.only}")
        ways = [
            Way(*noise, count, gamma)
            for noise in wanted
            for count in self.blocks
            for gamma in (self.gammas if count > 1 else (0.0,))
        ]
        jobs = [(way, seed) for way in ways for seed in range(self.seeds)]
        with ThreadPoolExecutor(self.processes) as pool:
            list(pool.map(lambda job: self._train(*job), jobs))
        torch.set_num_threads(1)
        judge = judge_of("digits")
        about = {"suite": "noise", **machine.machine(torch.device("cpu"))}
        rows = []
        for way in ways:
            found = [self._row(way, seed, judge) for seed in range(self.seeds)]
            rows.append(about | over_seeds(found, ("frechet", "recognised")))
        if self.out is not None:
            write_whole(self.out, "".join(json.dumps(row) + "\n" for row in rows))
        show(rows)

    def _directory(self, way: Way, seed: int) -> Path:
        return self.runs / "-".join(map(str, (*way, self.updates, seed)))

    def flags(self, way: Way) -> list[str]:
        """Of the run that is trained, but for its seed and its place."""
        noise = f"--process {way.process} --prediction {way.prediction}"
        blocks = f"--num-blocks {way.num_blocks} --gamma {way.gamma:g}"
        return shlex.split(f"dit {SIZES} {RATE} {noise} {blocks} --steps {self.updates}")

    def _train(self, way: Way, seed: int) -> None:
        directory = self._directory(way, seed)
        if (directory / "checkpoints" / f"step-{way.num_blocks * self.updates:08}").exists():
            return
        flags = [*self.flags(way), "--threads", "1", "--save-every", "500"]
        flags += ["--device", "cpu", "--seed", str(seed), "--out", str(directory)]
        if any((directory / "checkpoints").glob("step-*")):
            flags += ["--resume", "latest"]
        command = [sys.executable, "-m", "dbkernels", "train", *flags]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)} failed: {done.stderr.splitlines()[-1:]}")
        print(f"trained: {directory.name}", file=sys.stderr, flush=True)

    def _row(self, way: Way, seed: int, judge: Judge) -> Row:
        directory = self._directory(way, seed)
        config, blocks = load_run(directory, device="cpu")
        spacing = blocks.process.close if SAMPLERS[self.sampler].close else "cdf"
        levels = blocks.process.grid(self.levels, spacing)
        asked = torch.arange(judge.classes).repeat_interleave(self.per_class)
        how = {"guidance": GUIDANCE, "sampler": self.sampler}
        made = blocks.sample({"label": asked}, levels, Draw(seed, step=0), **how)
        return {
            "data": config.data,
            "batch": config.trainer.batch_size,
            "updates": self.updates,
            **way._asdict(),
            "sampler": f"{self.sampler}, {self.levels} levels",
            "frechet": [judge.distance(made)],
            "recognised": [judge.accuracy(made, asked)],
            "command": shlex.join(["dbkernels", "train", *self.flags(way)]),
        }


if __name__ == "__main__":
    try:
        tyro.cli(Noise).run()
    except ValueError as error:
        sys.exit(str(error))
