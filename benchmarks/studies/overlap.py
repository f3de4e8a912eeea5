"""How far blocks train into their neighbours' noise."""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

GAMMAS = (0.0, 0.05, 0.1, 0.2)


def _arms(scale: Scale) -> list[Arm]:
    return [
        arm("dit", setting, f"overlap {gamma:g}", cut(setting, 3, gamma))
        for setting in settings(scale, "dit")[:1]
        for gamma in GAMMAS
    ]


STUDY = Study(_arms)
