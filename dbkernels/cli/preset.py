"""The model that `profile` and `plan` are asked of."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from dbkernels.cli.train import FAMILY_HELP, PRESET_HELP
from dbkernels.memory.allocator import Target
from dbkernels.models.registry import FamilyName, family_named, family_with
from dbkernels.planning.recipe import Recipe, of_preset
from dbkernels.settings import MOST_SAMPLES, check_number

OF_PRESET = " None is the first that has the preset."


@dataclass(frozen=True, kw_only=True)
class OfPreset:
    """A preset of a family, and a batch for it."""

    family: Annotated[FamilyName | None, tyro.conf.arg(help=FAMILY_HELP + OF_PRESET)] = None
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
        family = self.family or family_with(self.preset)
        name = self.preset or family_named(family).model.smallest
        return replace(of_preset(family, name), **given)
