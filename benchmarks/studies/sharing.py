"""Whether blocks share the stem and the head, or each has its own.

Shared parts get an update from each block's step, so as many times more as there are blocks.
"""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

WAYS = {"shared": "", "each its own": " --sharing copies"}


def _arms(scale: Scale) -> list[Arm]:
    return [
        arm(family, setting, name, cut(setting) + flags)
        for family in ("vit", "dit")
        for setting in settings(scale, family)[:1]
        for name, flags in WAYS.items()
    ]


STUDY = Study(_arms)
