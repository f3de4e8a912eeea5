"""One run of a study: trained as a command would, measured, and kept with its row.

A run is a directory. What was trained goes on from its last checkpoint, and what was measured is
read again, so a study that was killed ends with the rows of one that was not.
"""

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import machine
import torch
import tyro
from judge import judge_of
from show import Row

from dbkernels import DiffusionBlocks
from dbkernels.cli.device import pick_device
from dbkernels.cli.train import Train
from dbkernels.models.start import Trained
from dbkernels.training.run import load_run
from dbkernels.training.run_config import RunConfig
from dbkernels.whole_file import write_whole
from studies.arm import Arm
from studies.measuring import SIZES, Sizes, figures
from studies.rivals import train_rival
from studies.study import More

SAVE_EVERY = 200  # steps


@dataclass(frozen=True)
class Job:
    """An arm with a seed, and what a row says of it.

    place:    of the data, as `dbkernels train` takes it
    runs:     directory of all runs
    about:    of the row: suite, study and command
    digest:   of the data; runs of others are refused
    more:     as that of a study, and the study's name, which is that of what is kept of it
    """

    arm: Arm
    seed: int
    place: str
    runs: Path
    device: str
    about: tuple[tuple[str, str], ...]
    digest: str = ""
    more: More | None = None
    sizes: Sizes = SIZES["tiny"]

    @property
    def directory(self) -> Path:
        return self.runs / f"{self.arm.folder}-{self.seed}"

    @property
    def source(self) -> "Job | None":
        """The run that this one starts from, if it does."""
        return replace(self, arm=self.arm.source) if self.arm.source else None

    @property
    def kept(self) -> list[Path]:
        """Files of what was measured: the family's own figures, and the study's where it has some.

        All are there where the job is done.
        """
        names = ["figures", *([dict(self.about)["study"]] if self.more else [])]
        return [self.directory / f"{name}.json" for name in names]

    def is_done(self) -> bool:
        """Whether nothing is left to train or to measure."""
        return all(path.is_file() for path in self.kept)

    def config(self) -> RunConfig:
        """Of the run, before it or what it starts from is trained.

        Raises:
            ValueError: a flag or the data is wrong.
        """
        if self.source is None:
            return self._command().config()
        first = self.source.config()
        without_noise = first.objective == "conventional"
        untrained = Trained("", first.family, first.model, {}, without_noise=without_noise)
        return self._command().config(untrained)

    def train(self) -> None:
        """Train what is missing."""
        with self._heard():
            self._command().run()

    def finish(self) -> Row:
        """Train what is missing, measure what is missing, and give the row.

        Raises:
            ValueError: the run is one of other data or of another kind of device, or what is kept
                of it is damaged.
            FloatingPointError: the loss is no number.
        """
        try:
            if not self.is_done():
                with self._heard():
                    self._train_and_measure()
            found = self._found()
        except (ValueError, FloatingPointError) as error:
            name = f"{self.arm.family}, {self.arm.data}, {self.arm.name}, seed {self.seed}"
            raise type(error)(f"{error} ({name}; its run is {self.directory})") from error
        # another study may have trained the same under another name
        names = {"arm": self.arm.name, "family": self.arm.family, "train": self._said()}
        return dict(self.about) | names | found

    def _found(self) -> Row:
        """What was measured."""
        found: Row = {}
        for path in self.kept:
            try:
                found |= json.loads(path.read_text())
            except (ValueError, TypeError):
                raise ValueError(
                    f"{path.name} must be what was measured, got {path.read_bytes()[:40]!r}: "
                    "remove it, and it is measured again"
                ) from None
        if found.get("data_digest") != self.digest:
            raise ValueError(
                f"runs must be of the data that {self.place} has, got other data: give other --runs"
            )
        on_cpu = torch.device(pick_device(self.device)).type == "cpu"
        if (found.get("driver") is None) != on_cpu:
            raise ValueError(
                f"device must be {'cuda' if on_cpu else 'cpu'} as for what was measured, got "
                f"{self.device}: give other --runs"
            )
        return found

    @contextmanager
    def _heard(self) -> Iterator[None]:
        """What the run says goes to a file beside it."""
        if self.device == "cpu":
            torch.set_num_threads(1)
        self.directory.mkdir(parents=True, exist_ok=True)
        with (
            (self.directory / "said.txt").open("a") as said,
            redirect_stdout(said),
            redirect_stderr(said),
        ):
            yield

    def _said(self) -> str:
        """What trains the run alone."""
        if not self.arm.baseline:
            return shlex.join(["dbkernels", "train", *self.arm.words(self.arm.data, self.seed)])
        arm = f"{self.arm.family} {self.arm.data} {self.arm.name}"
        return f"{dict(self.about)['command']} --only {shlex.quote(arm)}"

    def _train_and_measure(self) -> None:
        kept, *more = self.kept
        if self.arm.baseline:
            config = self.config()
            device = pick_device(self.device)
            found = train_rival(
                self.arm, config, self.directory, device, SAVE_EVERY, digest=self.digest
            )
            data = config.model.open(config.data, "test", convert=config.convert)
            row = self._told(config, found.layers) | found.figures(data, self.sizes.images)
            write_whole(kept, json.dumps(row))
            return
        config, blocks = self._trained()
        if not kept.is_file():
            row = self._told(config, [len(block.layers) for block in blocks])
            how = {"guidance": self.arm.guidance, "sizes": self.sizes}
            row |= figures(config, blocks, judge=partial(judge_of, self.place), **how)
            write_whole(kept, json.dumps(row))
        if self.more and not more[0].is_file():
            data = config.model.open(config.data, "test", convert=config.convert)
            write_whole(more[0], json.dumps(self.more(blocks, data, self.seed, self.sizes)))

    def _command(self) -> Train:
        source = self.source
        place = {"source": str(source.directory)} if source else {}
        words = [*self.arm.words(self.place, self.seed, **place), "--device", self.device]
        words += ["--threads", "1"] if self.device == "cpu" else []
        words += ["--save-every", str(SAVE_EVERY), "--keep", "1", "--out", str(self.directory)]
        if any((self.directory / "checkpoints").glob("step-*")):
            words += ["--resume", "latest"]
        return tyro.cli(Train, args=words, config=(tyro.conf.OmitArgPrefixes,))

    def _trained(self) -> tuple[RunConfig, DiffusionBlocks]:
        self._command().run()
        return load_run(self.directory, device=pick_device(self.device))

    def _told(self, config: RunConfig, layers: list[int]) -> Row:
        """What a row says beside its figures: where it ran, and the whole configuration."""
        name = self.arm.data
        # names in the place of paths, so that a row is the same on every machine
        start = replace(config.start, source="SOURCE") if self.arm.source else config.start
        where = machine.machine(torch.device(self.device if self.device != "auto" else "cpu"))
        return where | {
            "data": name,
            "data_digest": self.digest,
            "batch": config.trainer.batch_size,
            "updates": self.arm.updates,
            "num_blocks": len(layers),
            "layers": layers,
            "seed": self.seed,
            "baseline": list(self.arm.baseline),
            "config": asdict(replace(config, data=name, start=start)),
        }
