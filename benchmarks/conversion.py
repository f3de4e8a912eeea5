"""What blocks are worth that start from a network trained end to end, by how they are trained on.

Every competitor is a command that a user would type, `dbkernels train`: a network that is trained
end to end, blocks that start from it (`--from`) and are trained for fewer updates by one recipe or
another, the same network trained on end to end, and blocks that start from nothing. A run that is
there is not trained again, and one that was cut short goes on. Updates are counted by layer; what
all blocks share gets one from each block's step.

    python benchmarks/conversion.py --data DIR --runs DIR --out FILE.jsonl

--data is a directory of tokens, such as `tools/shakespeare.py` writes; the DiT learns digits.
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
from judge import Judge, judge_of
from seeds import over_seeds
from show import Row, show

from dbkernels import DiffusionBlocks, Draw
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig
from dbkernels.whole_file import write_whole

SOURCE = "end to end"  # what others start from
SIZES = {"ar": "--dim 128 --num-heads 4 --length 64 --depth 6", "dit": "--depth 6"}
BATCH = {"ar": "--batch-size 8", "dit": "--batch-size 64 --ema 0.99 --label-drop 0.1"}
RATE = "--lr 2e-3 --warmup 50 --decay cosine"  # from nothing
ON = "--warmup 20 --decay cosine"  # from a network that has learned
GENTLE = {"ar": "--lr 5e-4", "dit": "--lr 1e-3"}
WHOLE = {"ar": "--objective conventional --num-blocks 1", "dit": "--num-blocks 1"}
FITTED = "--num-blocks 3 --mean -0.55 --std 0.8 --sigma-max 8"  # as in text.py
LIKE = "--clean through --noise-order deepest --noisy-input z_and_clean --read-out posterior"
ALONE = "--next-token-weight 0"
WHOLE_GUESS = "--next-token-from network"
UNTRAINED, STILL = "3 blocks, untrained", "--lr 1e-12 --ema 0"  # after a step that moves nothing
COMPETITORS = {  # by family and name; those with FROM start from the source
    ("ar", SOURCE): WHOLE["ar"],
    ("ar", "end to end, trained on"): f"{WHOLE['ar']} FROM",
    ("ar", "3 blocks from nothing"): f"{FITTED} {LIKE}",
    ("ar", UNTRAINED): f"{FITTED} FROM {STILL}",
    ("ar", "3 blocks, alone"): f"{FITTED} FROM {ALONE}",
    ("ar", "3 blocks, distilled"): f"{FITTED} FROM {ALONE} --distill 1",
    ("ar", "3 blocks, clean loss"): f"{FITTED} FROM",
    ("ar", "3 blocks, distilled, clean loss"): f"{FITTED} FROM --distill 1",
    ("ar", "3 blocks, whole clean loss"): f"{FITTED} FROM {WHOLE_GUESS}",
    ("ar", "3 blocks, distilled, whole clean loss"): f"{FITTED} FROM {WHOLE_GUESS} --distill 1",
    ("ar", "3 blocks, own, alone"): f"{FITTED} FROM {ALONE} --clean own",
    ("ar", "3 blocks, own, clean loss"): f"{FITTED} FROM --clean own",
    ("dit", SOURCE): WHOLE["dit"],
    ("dit", "end to end, trained on"): f"{WHOLE['dit']} FROM",
    ("dit", "3 blocks from nothing"): "--num-blocks 3",
    ("dit", UNTRAINED): f"--num-blocks 3 FROM {STILL}",
    ("dit", "3 blocks, alone"): "--num-blocks 3 FROM",
    ("dit", "3 blocks, half distilled"): "--num-blocks 3 FROM --distill 0.5",
    ("dit", "3 blocks, distilled"): "--num-blocks 3 FROM --distill 1",
}
FIGURES = ("bits", "most_noise", "least", "ordinary", "frechet", "recognised")
GUIDANCE, LEVELS, PER_CLASS = 1.5, 30, 100  # of the digits that are drawn


@dataclass(frozen=True)
class Conversion:
    """Train what is missing, evaluate every run, and print a table over seeds of each family."""

    data: Path
    """Directory of tokens; its test split is what bits are of."""
    runs: Path
    """Directory of the runs."""
    seeds: int = 3
    """Of every competitor; a competitor starts from the source of its own seed."""
    source_updates: tuple[int, int] = (1500, 600)
    """Of every layer of the networks that others start from: of text, and of digits."""
    updates: int = 200
    """Of every layer, of all others."""
    windows: int = 128
    """Of the test split that are read, evenly spaced."""
    only: str = ""
    """Family, or the beginning of `family name`, of the competitors; empty takes all."""
    processes: int = 2
    """Runs that are trained at a time, one thread each."""
    out: Path | None = None
    """A file of rows to write; without it tables are printed alone."""

    def run(self) -> None:
        wanted = [key for key in COMPETITORS if " ".join(key).startswith(self.only)]
        if not wanted:
            names = ", ".join(" ".join(key) for key in COMPETITORS)
            raise ValueError(f"only must begin one of {names}, got {self.only}")
        sources = dict.fromkeys(
            (family, SOURCE) for family, name in wanted if _starts(family, name)
        )
        for keys in (sources, wanted):
            jobs = [(*key, seed) for key in keys for seed in range(self.seeds)]
            with ThreadPoolExecutor(self.processes) as pool:
                list(pool.map(lambda job: self._train(*job), jobs))
        torch.set_num_threads(1)
        digits = any(family == "dit" for family, _ in wanted)
        judge = judge_of("digits") if digits else None
        about = {"suite": "conversion", **machine.machine(torch.device("cpu"))}
        rows = []
        for key in wanted:
            found = [self._row(*key, seed, judge) for seed in range(self.seeds)]
            rows.append(about | over_seeds(found, FIGURES))
        if self.out is not None:
            write_whole(self.out, "".join(json.dumps(row) + "\n" for row in rows))
        for family in dict.fromkeys(family for family, _ in wanted):
            show([row for row in rows if row["family"] == family])

    def _directory(self, family: str, name: str, seed: int) -> Path:
        words = name.replace(",", "").split()
        return self.runs / "-".join([family, *words, str(self._updates(family, name)), str(seed)])

    def _updates(self, family: str, name: str) -> int:
        if name == SOURCE:
            return self.source_updates[family == "dit"]
        return 1 if name == UNTRAINED else self.updates

    def flags(self, family: str, name: str, source: str = "SOURCE") -> list[str]:
        """Of the run that is trained, but for its seed and its place."""
        starts = _starts(family, name)
        rate = f"{GENTLE[family]} {ON}" if starts else RATE
        sizes = "" if starts else SIZES[family]
        line = f"{family} {sizes} {BATCH[family]} {rate} --steps {self._updates(family, name)}"
        words = shlex.split(f"{line} {COMPETITORS[family, name]}")
        at = words.index("FROM") if starts else len(words)
        return [*words[:at], *(["--from", source] if starts else []), *words[at + 1 :]]

    def _train(self, family: str, name: str, seed: int) -> None:
        directory = self._directory(family, name, seed)
        steps = self._updates(family, name) * (3 if "3 blocks" in name else 1)
        if (directory / "checkpoints" / f"step-{steps:08}").exists():
            return
        flags = self.flags(family, name, str(self._directory(family, SOURCE, seed)))
        flags += ["--threads", "1", "--save-every", "500", "--device", "cpu"]
        flags += ["--data", str(self.data)] if family == "ar" else []
        flags += ["--seed", str(seed), "--out", str(directory)]
        if any((directory / "checkpoints").glob("step-*")):
            flags += ["--resume", "latest"]
        command = [sys.executable, "-m", "dbkernels", "train", *flags]
        done = subprocess.run(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        if done.returncode:
            raise ValueError(f"{shlex.join(command)} failed: {done.stderr.splitlines()[-1:]}")
        print(f"trained: {directory.name}", file=sys.stderr, flush=True)

    def _row(self, family: str, name: str, seed: int, judge: Judge | None) -> Row:
        """A run's figures, each in a list, as `over_seeds` wants them."""
        config, blocks = load_run(self._directory(family, name, seed), device="cpu")
        figures = _of_digits(blocks, seed, judge) if judge and family == "dit" else None
        row = {
            "data": Path(config.data).name,
            "batch": config.trainer.batch_size,
            "updates": self.updates,
            "source_updates": self._updates(family, SOURCE),
            "family": family,
            "competitor": name,
            "num_blocks": len(blocks),
            "command": shlex.join(["dbkernels", "train", *self.flags(family, name)]),
        }
        return row | (figures or _of_text(config, blocks, self.windows))


def _starts(family: str, name: str) -> bool:
    return "FROM" in COMPETITORS[family, name].split()


def _of_text(config: RunConfig, blocks: DiffusionBlocks, windows: int) -> Row:
    """Bits per character: of the bound, and of all layers as an ordinary network without noise."""
    data = config.model.open(config.data, "test")
    whole = DiffusionBlocks(blocks.model, 1, process=blocks.process)
    ordinary = whole.evaluate_conventional(data, samples=windows)
    if config.objective == "conventional":
        return {"bits": [ordinary.bits], "ordinary": [ordinary.bits]}
    found = blocks.evaluate(data, samples=windows, starts=0)
    noisy = {"bits": found.bits, "most_noise": found.most_noise, "least": found.least}
    return {name: [value] for name, value in (noisy | {"ordinary": ordinary.bits}).items()}


def _of_digits(blocks: DiffusionBlocks, seed: int, judge: Judge) -> Row:
    """How far digits are from real ones, and how many are recognised as what was asked for."""
    asked = torch.arange(judge.classes).repeat_interleave(PER_CLASS)
    levels = blocks.process.grid(LEVELS, "cdf")
    made = blocks.sample({"label": asked}, levels, Draw(seed, step=0), guidance=GUIDANCE)
    return {"frechet": [judge.distance(made)], "recognised": [judge.accuracy(made, asked)]}


if __name__ == "__main__":
    try:
        tyro.cli(Conversion).run()
    except ValueError as error:
        sys.exit(str(error))
