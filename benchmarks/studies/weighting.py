"""What weight each level of noise has in the loss of blocks."""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

WEIGHTINGS = {  # as the table calls them
    "none": "none",
    "process": "that of the process",
    "normalised": "the same, of mean 1 in a block",
    "published": "the published code's",
}


def _arms(scale: Scale) -> list[Arm]:
    return [
        arm(family, setting, called, f"{cut(setting)} --weighting {name}".removesuffix(default))
        for family, default in (("vit", " --weighting none"), ("dit", " --weighting process"))
        for setting in settings(scale, family)[:1]
        for name, called in WEIGHTINGS.items()
    ]


STUDY = Study(_arms)
