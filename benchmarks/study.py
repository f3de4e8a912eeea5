"""One of the paper's comparisons: train what is missing, measure it, and print a table over seeds.

    python benchmarks/study.py NAME [--seeds 3] [--scale tiny|small|paper]

Every run is a command that a user would type, `dbkernels train`, and the row has it. A study that
was killed goes on and ends with the same rows. It downloads nothing, and says which one command
brings what is missing.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from fits import require_fits
from show import Row, show_study
from studies import STUDIES, Arm, Job, Places, Scale
from studies.measuring import SIZES
from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.cli.sentence import in_a_sentence
from dbkernels.data.digest import digest
from dbkernels.pool import results
from dbkernels.settings import check_number
from dbkernels.training.run_config import RunConfig
from dbkernels.whole_file import write_whole

Name = Literal[tuple(STUDIES)]
OF_DATA = ("image_size", "channels", "num_classes", "vocabulary")  # what data say of a model


@dataclass(frozen=True)
class Run:
    """Repeat one of the paper's comparisons at a size that this machine can run."""

    name: Annotated[Positional[Name], tyro.conf.arg(metavar="NAME")]
    """What is compared."""
    seeds: int = 3
    """Of every arm."""
    scale: Scale = "tiny"
    """tiny: minutes of two CPU cores. small: many more updates. paper: the paper's own settings."""
    data: tuple[str, ...] = ()
    """NAME=PATH of data that are not built in, such as cifar100=DIR or shakespeare=DIR."""
    only: str = ""
    """One arm as `family data arm`, or the beginning of some; empty takes all."""
    runs: Path = Path("runs/studies")
    """Directory of the runs, which studies share."""
    processes: int = 2
    """Runs at a time, one thread each; 1 where a GPU trains."""
    device: str = "cpu"
    """auto, cpu or cuda."""
    out: Path | None = None
    """A file of rows to write, one of each run; without it a table is printed alone."""

    def run(self) -> None:
        check_number("seeds", self.seeds, 1)
        check_number("processes", self.processes, 1)
        pick_device(self.device)
        self._check_paths()
        study = STUDIES[self.name]
        jobs = self._jobs(study.arms(self.scale))
        if not jobs:
            names = "; ".join(map(_called, study.arms(self.scale)))
            raise ValueError(f"only must begin one of {names}, got {self.only}")
        rows = self._rows(jobs)
        if study.then is not None:
            more = self._jobs(study.then(self.scale, rows))
            jobs, rows = jobs + more, rows + self._rows(more)
        if study.finish is not None:
            rows = study.finish([(job.directory, row) for job, row in zip(jobs, rows, strict=True)])
        if self.out is not None:
            write_whole(self.out, "".join(json.dumps(row) + "\n" for row in rows))
        show_study(rows)

    def _check_paths(self) -> None:
        """Refuse where nothing can be written, before anything runs."""
        if self.runs.exists() and not self.runs.is_dir():
            raise ValueError(f"runs must be a directory, got the file {self.runs}")
        if self.out is not None and (self.out.is_dir() or not self.out.parent.is_dir()):
            raise ValueError(f"out must be a file in a directory that exists, got {self.out}")

    def _jobs(self, arms: Sequence[Arm]) -> list[Job]:
        """Of the arms that are wanted, each seed; refuses what cannot run before anything does."""
        places, study = Places.of(self.data), STUDIES[self.name]
        command = f"python benchmarks/study.py {self.name} --scale {self.scale}"
        about = {"suite": "study", "study": self.name, "scale": self.scale, "command": command}
        alone = [arm for arm in arms if _called(arm) == self.only]
        jobs = [
            Job(arm, seed, places[arm.data], self.runs, self.device, tuple(about.items()),
                more=study.more, sizes=SIZES[self.scale])
            for arm in alone or arms
            if _called(arm).startswith(self.only)
            for seed in range(self.seeds)
        ]  # fmt: skip
        configs = {job.arm: job.config() for job in jobs[:: self.seeds]}
        firsts = {arm.data: config for arm, config in reversed(configs.items())}
        digests = {name: _digest(config) for name, config in firsts.items()}
        if self.scale != "tiny":
            # the first arm of a family's data trains all layers at once, where any arm does
            firsts = {(arm.family, arm.data): arm for arm in reversed(configs)}
            for arm in firsts.values():
                _require_room(arm, configs[arm], pick_device(self.device))
        return [replace(job, digest=digests[job.arm.data]) for job in jobs]

    def _rows(self, jobs: Sequence[Job]) -> list[Row]:
        """What each job finds, in their order; the runs that some start from are trained before."""
        starts = [job.source for job in jobs if job.source and not job.is_done()]
        sources = {source.directory: partial(Job.train, source) for source in starts}
        list(results([*sources.values()], most=self.processes))
        rows = []
        for row in results([partial(Job.finish, job) for job in jobs], most=self.processes):
            rows.append(row)
            name = f"{row['family']}, {row['data']}, {row['arm']}, seed {row['seed']}"
            print(f"{len(rows)} of {len(jobs)}: {name}", file=sys.stderr, flush=True)
        return rows


def _digest(config: RunConfig) -> str:
    """Of the data that a run trains on; those that it is measured on must be there too."""
    config.model.open(config.data, "test", convert=config.convert)
    return digest(config.model.open(config.data, "train", convert=config.convert))


def _require_room(arm: Arm, config: RunConfig, device: torch.device) -> None:
    """Refuse what this machine has no memory for, by a prediction."""
    of_data = {name: getattr(config.model, name) for name in OF_DATA if hasattr(config.model, name)}
    require_fits(arm.family, arm.flags, device, of_data=of_data)


def _called(arm: Arm) -> str:
    return f"{arm.family} {arm.data} {arm.name}"


def main() -> None:
    """Run a study of the command line."""
    run = tyro.cli(Run)
    with in_a_sentence():
        try:
            run.run()
        except (KeyboardInterrupt, SystemExit):
            print("stopped: the same command goes on", file=sys.stderr)
            raise


if __name__ == "__main__":
    main()
