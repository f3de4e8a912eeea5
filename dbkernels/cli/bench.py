"""`python -m dbkernels bench`."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from dbkernels.cli.bench_bar import Bar
from dbkernels.cli.bench_child import ended, sigterm_as_interrupt
from dbkernels.cli.bench_jobs import Job, jobs
from dbkernels.cli.device import pick_device

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bench:
    """Run the benchmarks of a checkout and write a report on them.

    A run that was stopped goes on where it was: what is finished at this commit is not run again.
    """

    quick: bool = False
    """What takes eight minutes on one GPU or on two cores of a CPU; so it is unless it is full."""
    full: bool = False
    """Every method, policy and number of blocks, which takes hours on a GPU."""
    again: bool = False
    """Run also what is finished."""
    out: Path = Path("runs/bench")
    """Directory of the results, by device and commit, and of the report on all of them."""
    device: str = "auto"
    """Where the steps run: auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    threads: int = 0
    """Of the CPU; 0 is as many as torch takes."""

    def run(self) -> None:
        if self.quick and self.full:
            raise ValueError("bench is quick or full, got both")
        if self.threads < 0:
            raise ValueError(f"threads must be at least 0, got {self.threads}")
        device = pick_device(self.device)
        if not (CHECKOUT / "benchmarks").is_dir():
            raise ValueError(
                "bench needs a checkout of the repository, which has the benchmarks, "
                f"got an installed package in {CHECKOUT}"
            )
        console = Console(highlight=False, soft_wrap=True)
        try:
            with sigterm_as_interrupt():
                failed = self._run_and_report(device.type, console)
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on with what was not finished.")
            raise
        if failed:
            console.print(f"error: failed: {', '.join(failed)}", style="red")
            sys.exit(1)

    def _run_and_report(self, device: str, console: Console) -> list[str]:
        """The names of those that failed."""
        place = self._place(device)
        every = jobs(full=self.full, on_gpu=device == "cuda")
        todo = [job for job in every if self.again or not _finished(place, job).is_file()]
        if len(todo) < len(every):
            console.print(
                f"{len(every) - len(todo)} of {len(every)} cases are in {place} already; "
                "--again runs them again."
            )
        place.mkdir(parents=True, exist_ok=True)
        return self._run_all(todo, len(every), place, device, console) + self._report(console)

    def _place(self, device: str) -> Path:
        """The directory of this device and commit."""
        asked = [sys.executable, "benchmarks/machine.py", device]
        answer = subprocess.run(
            asked, cwd=CHECKOUT, env=_environment(), capture_output=True, text=True, check=True
        )
        names = json.loads(answer.stdout)
        return self.out / names["device"] / (names["commit"] or "no-commit")

    def _run_all(
        self, todo: Sequence[Job], count: int, place: Path, device: str, console: Console
    ) -> list[str]:
        """The names of those that failed."""
        failed = []
        with Bar([job.seconds for job in todo], done=count - len(todo), console=console) as bar:
            for job in todo:
                bar.begin(job.name)
                arguments = [job.program, "--json", *job.arguments, "--device", device]
                if self.threads:
                    arguments += ["--threads", str(self.threads)]
                rows, error = _run(arguments, _finished(place, job))
                took = f"{bar.end():.0f} s"
                if error is None:
                    console.print(f"{job.name}: {rows} rows in {took}")
                else:
                    failed.append(job.name)
                    console.print(f"{job.name} failed after {took}: {error}", markup=False)
        return failed

    def _report(self, console: Console) -> list[str]:
        if not any(self.out.rglob("*.jsonl")):
            return []
        results = self.out.resolve()
        command = [sys.executable, "tools/report.py", str(results)]
        command += ["--out", str(results / "report.html")]
        done = subprocess.run(
            command, cwd=CHECKOUT, env=_environment(), capture_output=True, text=True
        )
        if done.returncode:
            console.print(f"report failed: {_last_line(done.stderr)}", markup=False)
            return ["report"]
        console.print(f"report: {results / 'report.html'}")
        return []


def _finished(place: Path, job: Job) -> Path:
    """The file of a job's rows, which has this name once they are all there."""
    return place / f"{job.name}.jsonl"


def _run(arguments: Sequence[str], finished: Path) -> tuple[int, str | None]:
    """Run one program, each of its rows going to a file as it comes.

    Returns:
        The number of rows; and what the program said last, where it failed.
    """
    rows, coming = 0, finished.with_suffix(".part")
    command = [sys.executable, f"benchmarks/{arguments[0]}", *arguments[1:]]
    with tempfile.TemporaryFile("w+") as said, coming.open("w") as file:
        running = ended(command, said=said, cwd=CHECKOUT, environment=_environment())
        with running as process:
            for line in process.stdout:
                file.write(line)
                file.flush()
                rows += 1
        said.seek(0)
        if process.returncode:
            return rows, _last_line(said.read())
    os.replace(coming, finished)
    return rows, None


def _environment() -> dict[str, str]:
    """That of this process, with the checkout's package whatever is installed."""
    paths = [str(CHECKOUT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip() if lines else "it said nothing"
