"""What blocks of text models are worth in bits per character, beside networks trained end to end.

Every competitor is two commands that a user would type: `dbkernels train`, and `dbkernels evaluate`
on text that no model has seen. A run that is there is not trained again, and one that was cut short
goes on. All updates are counted by layer: what all blocks share gets one from each block's step.

    python benchmarks/text.py --data DIR --runs DIR --out benchmarks/results/NAME/text.jsonl

--data is a directory of tokens, such as `tools/shakespeare.py` writes.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import machine
import torch
import tyro
from seeds import over_seeds
from show import Row, show

from dbkernels.training.run_config import read_config
from dbkernels.whole_file import write_whole

SIZES = "--dim 128 --num-heads 4 --length 64"
RATE = "--batch-size 8 --lr 2e-3 --warmup 50 --decay cosine"
FITTED = "--mean -0.55 --std 0.8 --sigma-max 8"  # to where a character's information lies
POSTERIOR = f"--num-blocks 3 {FITTED} --read-out posterior"
THROUGH = "--clean through --noise-order deepest"
COMPETITORS = {  # by family and name
    ("mdm", "end to end"): "--num-blocks 1",
    ("mdm", "3 blocks"): "--num-blocks 3",
    ("ar", "end to end"): "--objective conventional --num-blocks 1",
    ("ar", "end to end, 2 layers"): "--objective conventional --num-blocks 1 --depth 2",
    ("ar", "3 blocks, the paper's"): "--num-blocks 3 --paper --next-token-weight 0",
    ("ar", "3 blocks, own"): f"{POSTERIOR} --next-token-weight 0",
    ("ar", "3 blocks, own, next token"): POSTERIOR,
    ("ar", "3 blocks, through"): f"{POSTERIOR} {THROUGH} --next-token-weight 0",
    ("ar", "3 blocks, through, next token"): f"{POSTERIOR} {THROUGH}",
    ("ar", "3 blocks, all of these"): f"{POSTERIOR} {THROUGH} --noisy-input z_and_clean",
    ("huginn", "conventional"): "--objective conventional --num-blocks 1 --depth 4",
    ("huginn", "one pass"): f"--num-blocks 1 {FITTED} --depth 4",
    ("huginn", "one pass, as much arithmetic"): f"--num-blocks 1 {FITTED} --depth 4",
}
# times the updates: a conventional step's forwards of one layer over those of one pass, 3 (c + e):
# r c + e + 2 (k c + e), of r = 8 recurrences, k = 4 of them with a gradient, c = 2 layers of the
# core and e = 2 others
TIMES = {("huginn", "one pass, as much arithmetic"): 38 / 12}
FIGURES = {  # ours, by the name that `evaluate` has for it
    "bits": "bits",
    "bits_down_to_least": "least",
    "bits_at_most_noise": "most_noise",
    "sampler_bits": "sampler",
    "bits_of_blocks": "blocks",
}


@dataclass(frozen=True)
class Text:
    """Train what is missing, evaluate every run, and print a table over seeds."""

    data: Path
    """Directory of tokens; its test split is what figures are of."""
    runs: Path
    """Directory of the runs."""
    seeds: int = 3
    """Of every competitor."""
    updates: int = 1500
    """Of every layer, but where `TIMES` says more."""
    windows: int = 256
    """Of the test split that are read, evenly spaced."""
    only: str = ""
    """Family, or the beginning of `family name`, of the competitors; empty takes all."""
    processes: int = 2
    """Runs that are trained or evaluated at a time, one thread each."""
    out: Path | None = None
    """A file of rows to write; without it a table is printed alone."""

    def run(self) -> None:
        wanted = {key: flags for key, flags in COMPETITORS.items() if self._is_wanted(*key)}
        if not wanted:
            names = ", ".join(" ".join(key) for key in COMPETITORS)
            raise ValueError(f"only must begin one of {names}, got {self.only}")
        jobs = [(*key, seed) for key in wanted for seed in range(self.seeds)]
        with ThreadPoolExecutor(self.processes) as pool:
            found = dict(zip(jobs, pool.map(lambda job: self._row(*job), jobs), strict=True))
        about = {"suite": "text", **machine.machine(torch.device("cpu")), "threads": 1}
        rows = []
        for key in wanted:
            alike = [found[(*key, seed)] for seed in range(self.seeds)]
            rows.append(about | over_seeds(alike, tuple(FIGURES.values())))
        if self.out is not None:
            write_whole(self.out, "".join(json.dumps(row) + "\n" for row in rows))
        show(rows)

    def _is_wanted(self, family: str, name: str) -> bool:
        return f"{family} {name}".startswith(self.only)

    def _directory(self, family: str, name: str, seed: int) -> Path:
        words = name.replace(",", "").replace("'", "").split()
        return self.runs / "-".join([family, *words, str(self.updates), str(seed)])

    def flags(self, family: str, name: str) -> list[str]:
        own = COMPETITORS[family, name]
        depth = "" if "--depth" in own else "--depth 6"
        steps = round(self.updates * TIMES.get((family, name), 1))
        return shlex.split(f"{family} {SIZES} {depth} {RATE} {own} --steps {steps}")

    def _train(self, family: str, name: str, seed: int, directory: Path) -> None:
        flags = [*self.flags(family, name), "--threads", "1", "--save-every", "500"]
        flags += ["--data", str(self.data), "--seed", str(seed), "--out", str(directory)]
        if any((directory / "checkpoints").glob("step-*")):
            flags += ["--resume", "latest"]
        _ran("train", *flags)
        print(f"trained: {directory.name}", file=sys.stderr, flush=True)

    def _row(self, family: str, name: str, seed: int) -> Row:
        """A run's figures in bits per character, each in a list, as `over_seeds` wants them."""
        directory = self._directory(family, name, seed)
        self._train(family, name, seed, directory)
        asked = [str(directory), "--samples", str(self.windows), "--device", "cpu", "--json"]
        found = json.loads(_ran("evaluate", *asked))
        print(f"evaluated: {directory.name}", file=sys.stderr, flush=True)
        row = {
            "data": self.data.name,
            "batch": read_config(directory).trainer.batch_size,
            "updates": self.updates,
            "family": family,
            "competitor": name,
            "num_blocks": found["num_blocks"],
            "depth": sum(found["layers"]),
            "windows": found["windows"],
            "command": shlex.join(["dbkernels", "train", *self.flags(family, name)]),
        }
        figures = {ours: found[its] for its, ours in FIGURES.items() if found[its] is not None}
        return row | {k: v if isinstance(v, list) else [v] for k, v in figures.items()}


def _ran(*arguments: str) -> str:
    """What a verb of the command line prints; it has one thread."""
    command = [sys.executable, "-m", "dbkernels", *arguments]
    one = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=one)
    if done.returncode:
        raise ValueError(f"{shlex.join(command)} failed: {done.stderr.splitlines()[-1:]}")
    return done.stdout


if __name__ == "__main__":
    try:
        tyro.cli(Text).run()
    except ValueError as error:
        sys.exit(str(error))
