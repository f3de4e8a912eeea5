"""All benchmarks: `python benchmarks/run.py --quick`, or `--full`.

Rows go to files by device and commit, and a report on all of them is made at the end. A run that
was stopped goes on where it was: what is in the files at this commit is not measured again.
"""

import importlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import tyro
from machine import commit, folder_name
from program import Known, Program
from rich.console import Console
from rich.progress import Progress
from training import LARGE

from dbkernels.cli.device import pick_device
from dbkernels.cli.table import plain_console

CHECKOUT = Path(__file__).parents[1]

AFTER = "--optimizer-in-backward False"  # the backward
FEW = f"--num-blocks 1 3 --recompute none qkv --budgets 1.0 {AFTER}"
PREDICTED = "--num-blocks 1 3 6 --recompute none qkv layer_narrow --budgets 1.0 0.5 " + AFTER
# of the published code's ViT: what its own way of training keeps, and what this project's does
PUBLISHED = f"--num-blocks 3 --recompute none qkv --rounds 6 {AFTER} --methods end_to_end"
PUBLISHED += " block_stock block_fused"
# a step as one CUDA graph beside the same step op by op
GRAPHS = f"--num-blocks 3 --recompute none --offload none --launch ops graph --rounds 12 {AFTER}"
GRAPHS += " --methods end_to_end block_fused"

# in a new process between fork and exec no code of ours may run, as the parent has threads: so the
# child asks for it in a Python of its own, and then becomes the program
WITH_PARENT = str(CHECKOUT / "dbkernels" / "with_parent.py")


@dataclass(frozen=True)
class Job:
    """One benchmark and its options."""

    name: str  # of the file of its rows, without the suffix
    program: str  # in benchmarks/, without the suffix
    seconds: int  # about how long it takes, the weight of its rows in the progress
    options: str = ""

    def arguments(self, run: "Run", place: Path) -> list[str]:
        threads = ["--threads", str(run.threads)] if run.threads else []
        out = ["--out", str((place / f"{self.name}.jsonl").resolve())]
        device = pick_device(run.device).type
        return [*shlex.split(self.options), "--device", device, *threads, "--json", *out]


@dataclass(frozen=True)
class Run:
    """Run the benchmarks and write a report on them.

    A run that was stopped goes on where it was: what is measured at this commit stays as it is.
    """

    quick: bool = False  # run the short benchmarks, eight minutes; the default
    full: bool = False  # run every method, policy and number of blocks: hours on a GPU
    again: bool = False  # measure again what was measured at this commit
    out: Path = Path("runs/bench")  # directory of the rows, by device and commit, and of the report
    device: str = "auto"  # auto, cpu or cuda; auto is an NVIDIA GPU where there is one
    threads: int = 0  # of the CPU; 0 is as many as torch takes

    def __post_init__(self):
        if self.quick and self.full:
            raise ValueError("a run must be quick or full, got both")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        pick_device(self.device)


def jobs(*, full: bool, on_gpu: bool) -> list[Job]:
    """All that one call runs, in order.

    Args:
        full:    every method, policy and number of blocks, and not what few minutes allow
        on_gpu:  whether models of a GPU's size run, or are predicted
    """
    large = [(family, name) for family, names in LARGE.items() for name in names]
    if full:
        found = [
            Job("timeline", "timeline", 30),
            Job("ops", "ops", 120),
            Job("layer", "layer", 240 if on_gpu else 60),
            _training("vit", "cifar100", 300 if on_gpu else 1800),
        ]
        found += [] if on_gpu else [_training(family, "digits", 200) for family in ("vit", "dit")]
        for family, names in LARGE.items():
            for number, name in enumerate(names, 1):
                found.append(_training(family, name, (600 if on_gpu else 120) * number))
        found += [_graphs(name) for name in LARGE["dit"]] if on_gpu else []
    elif on_gpu:
        found = [
            _training("dit", "S/2", 150, f"{FEW} --rounds 12"),
            # apart from the others, which it does not take along should it fail
            _graphs("S/2"),
            *(_training(*each, 12, f"{PREDICTED} --target this") for each in large[1:]),
        ]
    else:
        found = [
            _training("vit", "cifar100", 105, PUBLISHED),
            _training("vit", "digits", 45, f"{FEW} --rounds 15"),
            _training("dit", "digits", 40, f"{FEW} --rounds 15"),
            *(_training(*each, 18, PREDICTED) for each in large),
        ]
    if not full:
        found += [
            Job("timeline", "timeline", 20),
            Job("layer", "layer", 140 if on_gpu else 35),
            Job("ops", "ops", 50 if on_gpu else 90, "--rounds 5"),
        ]
    return [replace(job, name=f"{'full' if full else 'quick'}-{job.name}") for job in found]


def _graphs(preset: str) -> Job:
    return _training("dit", preset, 60, GRAPHS, suffix="-graphs")


def _training(family: str, preset: str, seconds: int, options: str = "", suffix: str = "") -> Job:
    name = f"training-{family}-{preset.replace('/', '')}{suffix}"
    return Job(name, "training", seconds, f"--family {family} --preset {preset} {options}")


def missing(job: Job, arguments: Sequence[str]) -> tuple[int, int]:
    """How many rows of a job are not there yet, and how many it has in all."""
    kind: type[Program] = importlib.import_module(job.program).Options
    options = tyro.cli(kind, args=arguments)
    known, wanted = Known(options.out, commit()), options.wanted()
    return sum(known.lacks(key) for key in wanted), len(wanted)


def run_all(run: Run, every: Sequence[Job], console: Console) -> list[str]:
    """Run what is not done yet; the names of the jobs that failed."""
    place = run.out / folder_name(pick_device(run.device)) / (commit() or "no-commit")
    place.mkdir(parents=True, exist_ok=True)
    todo, failed = {}, []
    for job in every:
        arguments = job.arguments(run, place)
        if run.again:
            Path(arguments[-1]).unlink(missing_ok=True)
        todo[job] = arguments, *missing(job, arguments)
    done = sum(lacking == 0 for _, lacking, _ in todo.values())
    if done:
        console.print(f"{done} of {len(every)} benchmarks are in {place}; --again runs them again.")
    weight = {job: job.seconds / count for job, (_, _, count) in todo.items()}
    total = sum(weight[job] * lacking for job, (_, lacking, _) in todo.items())
    shown = Progress(console=console, transient=True, disable=not console.is_terminal)
    with shown:
        task = shown.add_task("", total=total)
        for job, (arguments, lacking, _) in todo.items():
            if not lacking:
                continue
            shown.update(task, description=job.name)
            advance = partial(shown.advance, task, weight[job])
            rows, error = finished([f"benchmarks/{job.program}.py", *arguments], advance)
            shown.refresh()  # or what is printed stands above a bar of some time ago
            told = f": {rows} rows" if error is None else f" failed: {error}"
            console.print(f"{job.name}{told}")
            failed += [] if error is None else [job.name]
    return failed


def report(run: Run, console: Console) -> list[str]:
    """Draw all rows as a page; its name where that failed."""
    if not any(run.out.rglob("*.jsonl")):
        return []
    page = run.out.resolve() / "report.html"
    _, error = finished(["tools/report.py", str(page.parent), "--page", str(page)])
    told = f": {page}" if error is None else f" failed: {error}"
    console.print(f"report{told}")
    return [] if error is None else ["report"]


def finished(
    words: Sequence[str], each_line: Callable[[], object] = lambda: None
) -> tuple[int, str | None]:
    """Run a program of the checkout to its end.

    Where this is interrupted it is killed, with all that it began; on Linux it ends also where this
    process is killed.

    Args:
        words:      the program, and its arguments
        each_line:  is called for each line that it prints
    Returns:
        The number of those lines, and the last line of what it says on stderr if it failed.
    """
    command = [sys.executable, *words]
    if sys.platform == "linux":
        command = [sys.executable, "-IS", WITH_PARENT, str(os.getpid()), *command]
    # the checkout's package, whatever is installed
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    lines = 0
    with tempfile.TemporaryFile("w+") as said:
        with subprocess.Popen(
            command,
            cwd=CHECKOUT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=said,
            text=True,
            # a group of its own, so that one signal reaches the processes that it began
            start_new_session=True,
        ) as process:
            try:
                for _ in process.stdout:
                    lines += 1
                    each_line()
            except BaseException:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                raise
        said.seek(0)
        text = said.read().splitlines()
    *_, last = ["it said nothing", *(line.strip() for line in text if line.strip())]
    return lines, last if process.returncode else None


def main(run: Run, every: Sequence[Job]) -> None:
    """Run the jobs and the report; exit with 1 and their names where some failed."""

    def interrupt(number, frame):
        raise KeyboardInterrupt

    console = plain_console(soft_wrap=True)
    before = signal.signal(signal.SIGTERM, interrupt)  # as Ctrl-C does
    try:
        failed = run_all(run, every, console) + report(run, console)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on with what was not measured.")
        sys.exit(130)
    except ValueError as error:
        console.print(f"error: {error}", style="red")
        sys.exit(1)
    finally:
        signal.signal(signal.SIGTERM, before)
    if failed:
        console.print(f"error: failed: {', '.join(failed)}", style="red")
        sys.exit(1)


if __name__ == "__main__":
    asked = tyro.cli(Run)
    main(asked, jobs(full=asked.full, on_gpu=pick_device(asked.device).type == "cuda"))
