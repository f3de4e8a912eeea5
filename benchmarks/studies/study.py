"""What a study is: arms to train, in one stage or in two, and what is asked of each."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from show import Row

from dbkernels import DiffusionBlocks
from dbkernels.data.images import Data
from studies.arm import Arm
from studies.measuring import Sizes
from studies.scales import SETTINGS, Scale, Setting

More = Callable[[DiffusionBlocks, Data, int, Sizes], Row]
Finish = Callable[[Sequence[tuple[Path, Row]]], list[Row]]


@dataclass(frozen=True)
class Study:
    """A question, and the arms that answer it.

    arms:      of a scale, in the order of the table
    then:      arms that follow from the rows of those; None for none
    more:      figures beside the family's own, of the trained blocks, their test data, the seed and
               how much an evaluation reads; None for none
    finish:    the rows once more, by the directories of their runs, when all are there; None leaves
               them as they are
    """

    arms: Callable[[Scale], list[Arm]]
    then: Callable[[Scale, Sequence[Row]], list[Arm]] | None = None
    more: More | None = None
    finish: Finish | None = None


def settings(scale: Scale, family: str) -> tuple[Setting, ...]:
    """The models of a family at a scale, one for each of its data."""
    return SETTINGS[scale][family]


def arm(family: str, setting: Setting, name: str, flags: str, *, times: float = 1) -> Arm:
    """An arm of a setting.

    Args:
        flags:  behind those of the setting; of a flag that is there twice the last one counts
        times:  as many updates
    """
    words = f"--depth {setting.depth} {setting.flags} {flags}".split()
    updates = round(setting.updates * times)
    return Arm(family, name, setting.data, " ".join(words), updates, guidance=setting.guidance)


def cut(setting: Setting, count: int | None = None, gamma: float | None = None) -> str:
    """Flags that cut a setting's layers into blocks, as many as it has or `count`."""
    blocks = setting.blocks if count is None else count
    if blocks == 1:  # overlaps none; other studies have its runs under these words too
        return "--num-blocks 1"
    return f"--num-blocks {blocks} --gamma {setting.gamma if gamma is None else gamma:g}"
