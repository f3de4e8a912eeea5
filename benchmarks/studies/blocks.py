"""How many blocks: 1, 2, 3, 4 and 6 of the same layers, without overlap."""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

COUNTS = (1, 2, 3, 4, 6)


def _arms(scale: Scale) -> list[Arm]:
    return [
        arm(family, setting, f"{count} block{'s' * (count > 1)}", cut(setting, count, gamma=0))
        for family in ("vit", "dit")
        for setting in settings(scale, family)[:1]
        for count in COUNTS
    ]


STUDY = Study(_arms)
