"""How many blocks: 1, 2, 3, 4 and 6 of the same layers, without overlap, and what was predicted.

Two more runs of one block, with a third of the layers and with a third of the updates, are what
`plan --quality` needs to predict the others. So a row has its loss over the noise of one block, and
the loss that was predicted for it.
"""

from collections.abc import Sequence
from pathlib import Path

from show import Row

from dbkernels.planning.quality import mean_loss, predicted
from dbkernels.training.run_config import read_config
from studies.arm import Arm
from studies.scales import Scale, Setting
from studies.study import Study, arm, cut, settings

COUNTS = (1, 2, 3, 4, 6)
ONE = "1 block"
SHALLOW, SHORT = f"{ONE}, a third of the layers", f"{ONE}, a third of the updates"


def _arms(scale: Scale) -> list[Arm]:
    arms = []
    for family in ("vit", "dit"):
        for setting in settings(scale, family)[:1]:
            arms += [
                _of(family, setting, f"{count} block{'s' * (count > 1)}", count) for count in COUNTS
            ]
            arms.append(_of(family, setting, SHALLOW, 1, f"--depth {setting.depth // 3}"))
            arms.append(_of(family, setting, SHORT, 1, times=1 / 3))
    return arms


def _of(
    family: str, setting: Setting, name: str, count: int, more: str = "", times: float = 1
) -> Arm:
    flags = f"{cut(setting, count, gamma=0)} {more}"
    return arm(family, setting, name, flags, times=times)


def _with_predictions(found: Sequence[tuple[Path, Row]]) -> list[Row]:
    """Each row with its loss over the noise of one block, and with what one block predicts."""
    losses: dict[Path, Row] = {}
    for family in dict.fromkeys(row["family"] for _, row in found):
        of_family = {path: row for path, row in found if row["family"] == family}
        arms = {row["arm"] for row in of_family.values()}
        if not {ONE, SHALLOW, SHORT} <= arms:
            continue  # some were left out
        known = [p for p, row in of_family.items() if row["arm"] in (ONE, SHALLOW, SHORT)]
        prior = read_config(known[0]).prior
        ways = {path: read_config(path) for path in of_family}
        expected = dict(zip(ways, predicted(known, list(ways.values())), strict=True))
        for path, config in ways.items():
            loss = mean_loss(prior, config, of_family[path]["loss_of_blocks"])
            losses[path] = {"mean_loss": loss}
            if path not in known:
                losses[path]["predicted_loss"] = expected[path].loss
    return [row | losses.get(path, {}) for path, row in found]


STUDY = Study(_arms, finish=_with_predictions)
