"""Fuzz of the ends of a run: killed or damaged anywhere, it comes to the same bits.

    python tests/fuzz/kill.py --kills 40 --seed 1

A run is killed again and again, without warning or by a signal that it may answer, and resumed. A
part of the time a byte of its newest checkpoint is flipped before. When it comes to its end, its
checkpoint has the bits of a run that nothing ever disturbed.
"""

import os
import random
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from forked import Ended, forked

from dbkernels.__main__ import run as command
from dbkernels.training import checkpoint
from dbkernels.training.log import read_log

RUN = (
    "train dit --data digits --depth 4 --num-blocks 2 --dim 32 --num-heads 2 --ema 0.9 "
    "--batch-size 8 --device cpu --save-every 3"
)
ASKED = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGINT)
GRACE = 30  # seconds in which a run that was asked to end has saved and ended


@dataclass(frozen=True)
class Fuzz:
    """Fuzz the ends of runs."""

    kills: int = 40
    """Ends of a run."""
    seed: int = 1
    """Seed of their times and kinds."""
    steps: int = 40
    """Of each block of a run."""


def train(out: Path, steps: int, kill: tuple[float, signal.Signals] | None = None) -> Ended:
    """Train or go on in a process, which is sent a signal after some seconds."""
    resume = " --resume latest" if checkpoint.latest(out / "checkpoints") else ""

    def case() -> None:
        sys.argv[1:] = f"{RUN} --steps {steps} --out {out}{resume}".split()
        command()

    if kill is None:
        return forked(case, 300)
    seconds, number = kill

    def killed() -> None:
        target, watcher = os.getpid(), os.fork()
        if not watcher:
            time.sleep(seconds)
            os.kill(target, number)
            os._exit(0)
        case()

    return forked(killed, seconds + GRACE)


def flip(path: Path, rng: random.Random) -> None:
    """Flip a byte of one of a checkpoint's files."""
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def logged(out: Path) -> int:
    """Steps that a run's log has."""
    return len(read_log(out / "log.jsonl"))


def lost(out: Path) -> int:
    """Steps of a run that its newest checkpoint, of those that are whole, does not have."""
    if checkpoint.latest(out / "checkpoints") is None:
        return logged(out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        newest, *_ = checkpoint.load_latest(out / "checkpoints")
    return logged(out) - int(newest.name.removeprefix("step-"))


def end(out: Path) -> dict[str, dict[str, torch.Tensor]]:
    return checkpoint.load(checkpoint.latest(out / "checkpoints"))[0]


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        named.keys() == other[group].keys()
        and all(torch.equal(tensor, other[group][name]) for name, tensor in named.items())
        for group, named in one.items()
    )


def fuzz(kills: int, seed: int, steps: int) -> list[str]:
    """End runs so often; a sentence for each end that was wrong."""
    rng, wrong, done, runs = random.Random(seed), [], 0, 0
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        begin = time.monotonic()
        assert train(root / "whole", steps).code == 0
        length, expected = time.monotonic() - begin, end(root / "whole")
        while done < kills:
            runs += 1
            out, code = root / f"run{runs}", None
            while code != 0 and done < kills:
                number, before = rng.choice((signal.SIGKILL, *ASKED)), logged(out)
                ended = train(out, steps, (rng.uniform(0, length), number))
                code, done = ended.code, done + 1
                if code not in (0, -number, 128 + number):
                    wrong.append(f"{number.name}: exit {code}: {ended.err.strip()[-300:]}")
                # a signal may end what does not train yet
                answered = code == 0 or "ended the run" in ended.err
                if answered and (rows := lost(out)):
                    wrong.append(f"{number.name}: {rows} steps lost: {ended.err.strip()[-300:]}")
                if number in ASKED and not answered and logged(out) != before:
                    wrong.append(f"{number.name}: not answered: {ended.err.strip()[-300:]}")
                there = sorted((out / "checkpoints").glob("step-*")) if out.exists() else []
                if len(there) > 1 and rng.random() < 0.3:
                    flip(there[-1], rng)
                    code = None
            if (last := train(out, steps)).code != 0 or not same(end(out), expected):
                wrong.append(f"run {runs}: exit {last.code}, other bits: {last.err.strip()[-300:]}")
    return wrong


def run(arguments: Sequence[str] | None = None) -> None:
    asked = tyro.cli(Fuzz, args=arguments)
    found = fuzz(asked.kills, asked.seed, asked.steps)
    print("\n".join([*found, f"{asked.kills} ends: {len(found)} wrong"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    run()
