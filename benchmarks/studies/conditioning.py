"""Whether the layers of blocks are told the noise level."""

from dataclasses import replace

from studies.arm import Arm
from studies.rivalry import rival
from studies.scales import Scale
from studies.study import Study

ARMS = {"with": "diffusion blocks", "without": "diffusion blocks, unconditioned"}


def _arms(scale: Scale) -> list[Arm]:
    return [replace(rival(scale, "vit", name), name=called) for called, name in ARMS.items()]


STUDY = Study(_arms)
