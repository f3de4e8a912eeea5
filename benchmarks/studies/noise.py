"""Which noise a generator of images learns on, and what its network predicts."""

from dbkernels.diffusion.prediction import PREDICTIONS
from studies.arm import Arm
from studies.families import WHOLE
from studies.scales import DRAWN, Scale, Setting
from studies.study import Study, arm, cut, settings

NOISES = [(process, name) for process, names in PREDICTIONS.items() for name in names]
OWN = ("gaussian", "edm")  # a generator's own, whose runs other studies have too
DIGITS: dict[Scale, Setting] = {"small": Setting("digits", 12, 3, 0.05, 1000, DRAWN)}


def _arms(scale: Scale) -> list[Arm]:
    setting = DIGITS.get(scale) or settings(scale, "dit")[0]
    arms = []
    for process, prediction in NOISES:
        own = (process, prediction) == OWN
        flags = "" if own else f" --process {process} --prediction {prediction}"
        for way, blocks in (("end to end", WHOLE), (f"{setting.blocks} blocks", cut(setting))):
            arms.append(arm("dit", setting, f"{process} {prediction}, {way}", blocks + flags))
    return arms


STUDY = Study(_arms)
