"""The model that `profile` and `plan` are asked of."""

from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from dbkernels.cli.table import Row
from dbkernels.cli.train import FAMILY_HELP, PRESET_HELP
from dbkernels.memory.allocator import Target
from dbkernels.models.registry import FamilyName, family_named, family_with
from dbkernels.planning.recipe import Recipe, of_preset
from dbkernels.settings import MOST_SAMPLES, check_number
from dbkernels.training.optimizers.registry import OptimizerName

TOKENS = 2**15  # of a batch that nobody gives, at most
OF_PRESET = " None is the first that has the preset."


@dataclass(frozen=True, kw_only=True)
class OfPreset:
    """A preset of a family, and a batch for it."""

    family: Annotated[FamilyName | None, tyro.conf.arg(help=FAMILY_HELP + OF_PRESET)] = None
    preset: Annotated[str, tyro.conf.arg(help=PRESET_HELP)] = ""
    batch: int | None = None
    """Samples of a step; made up, of the preset's shape. None is 128, or the power of two below it
    that has at most 32768 tokens, for each device that takes a share."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    optimizer: OptimizerName = "adamw"
    """As for train."""
    data_parallel: int = 1
    """Devices that share a batch, of which one is predicted; each block has a job of its own."""
    tensor_parallel: int = 1
    """Devices that share each layer, for each share of a batch."""
    shard: bool = False
    """Have each device that shares a batch hold a share of every parameter, by FSDP2."""
    json: bool = False
    """Print one JSON object a line instead of tables."""

    def recipe(self, target: Target) -> Recipe:
        """The way to train it that has every other setting by default."""
        family = self.family or family_with(self.preset)
        name = self.preset or family_named(family).model.smallest
        recipe, batch = of_preset(family, name), self.batch
        if batch is None:
            batch = min(128, 2 ** max(0, (TOKENS // recipe.model.tokens).bit_length() - 1))
            batch *= max(1, self.data_parallel)
        check_number("batch", batch, 1, MOST_SAMPLES)
        recipe = replace(recipe, batch_size=batch, optimizer=self.optimizer)
        recipe = replace(recipe, autocast=self.autocast, device=target, shard=self.shard)
        shared = {name: getattr(self, name) for name in ("data_parallel", "tensor_parallel")}
        return replace(recipe, **shared)


def devices_of(row: Row) -> str:
    """Of several devices, how they share a step; nothing of one."""
    data, tensor = (row.get(f"{name}_parallel", 1) for name in ("data", "tensor"))
    words = [f"one of {data * tensor} devices"]
    words += [f"{tensor} to a layer"] if tensor > 1 else []
    words += ["parameters shared out"] if row.get("shard") else []
    return ", ".join(words) if data * tensor > 1 else ""
