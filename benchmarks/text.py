"""What blocks of text models are worth in bits per character, beside networks trained end to end.

Every competitor is a command that a user would type: `dbkernels train`, then an evaluation on text
that no model has seen. A run that is there is not trained again, and one that was cut short goes
on. All updates are counted by layer: what all blocks share gets an update from each block's step.

    python benchmarks/text.py --data DIR --runs DIR --out benchmarks/results/NAME/text.jsonl

--data is a directory of tokens, such as `tools/shakespeare.py` writes.
"""

import json
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

from dbkernels.data.images import Data
from dbkernels.training.evaluated import Evaluated
from dbkernels.training.run import load_run
from dbkernels.whole_file import write_whole

SIZES = "--dim 128 --num-heads 4 --length 64"
RATE = "--batch-size 12 --lr 2e-3 --warmup 50 --decay cosine"
FITTED = "--mean -0.55 --std 0.8 --sigma-max 8"  # to where a character's information lies
THROUGH = "--clean through --noise-order deepest"
COMPETITORS = {  # by family and name
    ("mdm", "end to end"): "--num-blocks 1",
    ("mdm", "end to end, 2 layers"): "--num-blocks 1 --depth 2",
    ("mdm", "3 blocks"): "--num-blocks 3",
    ("ar", "end to end"): "--objective conventional --num-blocks 1",
    ("ar", "end to end, 2 layers"): "--objective conventional --num-blocks 1 --depth 2",
    ("ar", "3 blocks, the paper's"): "--num-blocks 3 --paper --next-token-weight 0",
    ("ar", "3 blocks, own"): f"--num-blocks 3 {FITTED} --next-token-weight 0",
    ("ar", "3 blocks, own, next token"): f"--num-blocks 3 {FITTED}",
    ("ar", "3 blocks, through"): f"--num-blocks 3 {FITTED} {THROUGH} --next-token-weight 0",
    ("ar", "3 blocks, through, next token"): f"--num-blocks 3 {FITTED} {THROUGH}",
    ("huginn", "conventional"): "--objective conventional --num-blocks 1 --depth 4",
    ("huginn", "one pass"): f"--num-blocks 1 {FITTED} --depth 4",
}
FIGURES = ("bits", "least", "most_noise", "sampler", "blocks")


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
    """Of every layer."""
    only: str = ""
    """Family, or the beginning of `family name`, of the competitors; empty takes all."""
    processes: int = 2
    """Runs that are trained at a time, one thread each."""
    out: Path | None = None
    """A file of rows to write; without it a table is printed alone."""

    def run(self) -> None:
        wanted = {key: flags for key, flags in COMPETITORS.items() if self._is_wanted(*key)}
        if not wanted:
            names = ", ".join(" ".join(key) for key in COMPETITORS)
            raise ValueError(f"only must begin one of {names}, got {self.only}")
        jobs = [(*key, seed) for key in wanted for seed in range(self.seeds)]
        with ThreadPoolExecutor(self.processes) as pool:
            list(pool.map(lambda job: self._train(*job), jobs))
        about = {"suite": "text", **machine.machine(torch.device("cpu")), "threads": 1}
        rows = []
        for family, name in wanted:
            found = [self._row(family, name, seed) for seed in range(self.seeds)]
            rows.append(about | over_seeds(found, FIGURES))
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
        return shlex.split(f"{family} {SIZES} {depth} {RATE} {own} --steps {self.updates}")

    def _train(self, family: str, name: str, seed: int) -> None:
        directory = self._directory(family, name, seed)
        flags = [*self.flags(family, name), "--threads", "1", "--save-every", "500"]
        flags += ["--data", str(self.data), "--seed", str(seed), "--out", str(directory)]
        if any((directory / "checkpoints").glob("step-*")):
            flags += ["--resume", "latest"]
        command = [sys.executable, "-m", "dbkernels", "train", *flags]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)} failed: {done.stderr.splitlines()[-1:]}")
        print(f"trained: {directory.name}", file=sys.stderr, flush=True)

    def _row(self, family: str, name: str, seed: int) -> Row:
        config, blocks = load_run(self._directory(family, name, seed), device="cpu")
        found = measured(config.objective, blocks, config.model.open(str(self.data), "test"))
        return {
            "data": self.data.name,
            "batch": config.trainer.batch_size,
            "updates": self.updates,
            "family": family,
            "competitor": name,
            "num_blocks": len(blocks),
            "depth": config.model.depth,
            **found,
            "command": shlex.join(["dbkernels", "train", *self.flags(family, name)]),
        }


def measured(objective: str, blocks: Evaluated, data: Data) -> Row:
    """The figures of a run in bits per character, each in a list, as `over_seeds` wants them."""
    if objective == "conventional":
        found = blocks.evaluate_conventional(data)
    else:
        found = blocks.evaluate(data)
    row: Row = {"bits": [found.bits], "windows": found.windows, "blocks": list(found.blocks)}
    given = {"least": found.least, "most_noise": found.most_noise}
    row |= {name: [bits] for name, bits in given.items() if bits is not None}
    if found.sampler is not None:
        row["sampler"] = [found.sampler.bits]
    return row


if __name__ == "__main__":
    try:
        tyro.cli(Text).run()
    except ValueError as error:
        sys.exit(str(error))
