"""Fuzz of checkpoints that a thread writes: killed anywhere, the old or the new one is there.

    python tests/fuzz/kill_saver.py --kills 40 --seed 1

A process trains numbers that all are the step, and has each step saved beside the next one. It is
killed without warning and begins again from its newest checkpoint. That one is whole, its numbers
are its own step's, and it is one that was handed over and none from before one that was published.
"""

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked

from dbkernels.training import checkpoint

NUMBERS = 2**17  # of each tensor, so that a save takes about as long as what lies between two
TENSORS = 4
STEPS = 8  # of a process that is not killed
SECONDS = 60  # a process that takes longer hangs


@dataclass(frozen=True)
class Fuzz:
    """Fuzz the ends of processes that save beside their steps."""

    kills: int = 40
    """Ends of a process."""
    seed: int = 1
    """Seed of their times."""


def newest(root: Path) -> int:
    """The step of the newest checkpoint, 0 where there is none."""
    path = checkpoint.latest(root)
    return int(path.name.removeprefix("step-").removesuffix(".replaced")) if path else 0


def train(root: Path, told: Path) -> None:
    """Go on from the newest checkpoint; tell which step is handed over, and which is published."""
    first = newest(root) + 1
    named = {str(index): torch.zeros(NUMBERS) for index in range(TENSORS)}
    with checkpoint.Saver() as saver, told.open("a") as file:
        for step in range(first, first + STEPS):
            for tensor in named.values():
                tensor.fill_(step)
            print(step, max(step - 2, first - 1), file=file, flush=True)
            # when it returns, the one before is published
            saver.save(root, step, {"model": named, "ema": {"w": named["0"]}}, {"step": step})
            print(step, step - 1, file=file, flush=True)
            for tensor in named.values():
                tensor.fill_(-1)
            saver.check()


def wrong_of(root: Path, told: Path) -> str:
    """What is wrong with what a process left, in a sentence, or nothing."""
    handed, published = map(int, told.read_text().splitlines()[-1].split())
    step = newest(root)
    if not published <= step <= handed:
        return f"step {step} is the newest, of {published} that was published and {handed}"
    try:
        tensors, state = checkpoint.load(checkpoint.latest(root))
    except ValueError as error:
        return str(error)
    found = {number for named in tensors.values() for t in named.values() for number in t.tolist()}
    return "" if found == {step} and state == {"step": step} else f"step {step} has other numbers"


def half_written(root: Path) -> list[str]:
    """Names of what a save left that did not come to its end."""
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


def fuzz(kills: int, seed: int) -> list[str]:
    """End processes so often; a sentence for each end that was wrong."""
    rng, wrong = random.Random(seed), []
    with tempfile.TemporaryDirectory() as directory:
        root, told = Path(directory) / "checkpoints", Path(directory) / "told"
        begin = time.monotonic()
        assert forked(lambda: train(root, told), SECONDS).code == 0
        length = time.monotonic() - begin
        moved = cut = 0
        for kill in range(kills):
            seconds, before = rng.uniform(0, length), newest(root)

            def killed(seconds: float = seconds) -> None:
                target, watcher = os.getpid(), os.fork()
                if not watcher:
                    time.sleep(seconds)
                    os.kill(target, signal.SIGKILL)
                    os._exit(0)
                train(root, told)
                # it may have been faster
                signal.pause()

            ended = forked(killed, SECONDS)
            if ended.code != -signal.SIGKILL:
                wrong.append(f"kill {kill}: exit {ended.code}: {ended.err.strip()[-300:]}")
            if sentence := wrong_of(root, told):
                wrong.append(f"kill {kill}: {sentence}")
            moved, cut = moved + (newest(root) > before), cut + bool(half_written(root))
        if min(moved, cut) < kills // 10:
            wrong.append(f"only {moved} of {kills} had time to save, and {cut} were cut short")
        # what was left half written is gone
        with checkpoint.Saver() as saver:
            saver.save(root, newest(root) + 1, {}, {})
        if left := half_written(root):
            wrong.append(f"left: {left}")
    return wrong


def run(arguments: Sequence[str] | None = None) -> None:
    asked = tyro.cli(Fuzz, args=arguments)
    found = fuzz(asked.kills, asked.seed)
    print("\n".join([*found, f"{asked.kills} ends: {len(found)} wrong"]))
    sys.exit(bool(found))


if __name__ == "__main__":
    run()
