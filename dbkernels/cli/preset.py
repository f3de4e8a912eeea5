"""The model that `profile` and `plan` are asked of."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from dbkernels.cli.train import FAMILY_HELP, PRESET_HELP
from dbkernels.memory.allocator import Target
from dbkernels.models.registry import DEFAULT_FAMILY, FamilyName, family_named
from dbkernels.planning.recipe import Recipe, of_preset
from dbkernels.settings import MOST_SAMPLES, check_number


@dataclass(frozen=True, kw_only=True)
class OfPreset:
    """A preset of a family, and a batch for it."""

    family: Annotated[FamilyName, tyro.conf.arg(help=FAMILY_HELP)] = DEFAULT_FAMILY
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = ""
    batch: int = 128
    """Samples of a step; made up, of the preset's shape."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    json: bool = False
    """Print one JSON object a line instead of tables."""

    def recipe(self, target: Target) -> Recipe:
        """The way to train it that has every other setting by default."""
        check_number("batch", self.batch, 1, MOST_SAMPLES)
        given = {"batch_size": self.batch, "autocast": self.autocast, "device": target}
        name = self.preset or family_named(self.family).model.smallest
        return replace(of_preset(self.family, name), **given)
