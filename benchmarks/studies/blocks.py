"""How many blocks: 1, 2, 3, 4 and 6 of the same layers, without overlap."""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

COUNTS = (1, 2, 3, 4, 6)


def _arms(scale: Scale) -> list[Arm]:
    return [
        arm(
            family,
            setting,
            f"{count} block{'s' * (count > 1)}",
            f"{cut(setting, count, gamma=0)} {setting.fitted}",
        )
        for family in ("vit", "dit", "ar")
        for setting in settings(scale, family)[:1]
        for count in COUNTS
        if setting.depth % count == 0
    ]


STUDY = Study(_arms)
