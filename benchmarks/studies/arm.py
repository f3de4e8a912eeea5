"""What a study compares: ways of training, each of which is run with several seeds."""

import hashlib
import shlex
from dataclasses import dataclass


@dataclass(frozen=True)
class Arm:
    """One line of a study's table, but for its seed.

    family:    of the model
    name:      what the table calls it
    data:      where its data are, by a name that `places.Places` knows
    flags:     of `dbkernels train`, with those of the scale before them
    updates:   of every layer
    baseline:  network and name of a row of `baselines.BASELINES`, which is trained in place of the
               family's own blocks, by the trainer that the flags describe; empty for none
    guidance:  of the images that a generator draws
    steps:     of an answer of those baselines that take many
    source:    whose run with the same seed this one starts from; None starts from nothing
    """

    family: str
    name: str
    data: str
    flags: str
    updates: int
    baseline: tuple[str, str] | tuple[()] = ()
    guidance: float = 1.5
    steps: int = 50
    source: "Arm | None" = None

    def words(self, place: str, seed: int, source: str = "SOURCE") -> list[str]:
        """Arguments of `dbkernels train`, but for the directory of the run.

        Args:
            place:   of the data
            source:  the directory of the run that it starts from, where it does
        """
        words = [self.family, "--data", place, *shlex.split(self.flags)]
        words += ["--from", source] if self.source else []
        return [*words, "--steps", str(self.updates), "--seed", str(seed)]

    @property
    def folder(self) -> str:
        """A name of its runs' directories; arms that differ by their name alone share them."""
        said = [self.family, self.data, self.flags, str(self.updates), *self.baseline]
        said += [self.source.folder] if self.source else []
        # what an answer is asked for, where it is not what most arms have
        asked = (self.guidance, Arm.guidance), (self.steps, Arm.steps)
        said += [str(own) for own, usual in asked if own != usual]
        digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:10]
        parts = [self.family, *self.baseline[:1], self.data, digest]
        return "-".join(parts)
