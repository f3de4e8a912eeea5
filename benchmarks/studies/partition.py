"""How the noise is cut, and how the layers: without overlap.

Of text, a prior that is fitted to the information and cut into equal probabilities is a cut into
equal information.
"""

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

SCHEMES = ("equal_probability", "log_uniform", "linear")  # the first is that of other studies
SPLITS = ((1, 1, 1), (3, 6, 3), (6, 4, 2), (2, 4, 6))  # shares of the layers, the most noise first


def _arms(scale: Scale) -> list[Arm]:
    arms = []
    for setting in settings(scale, "dit")[:1]:
        blocks = cut(setting, 3, gamma=0)
        for shares in SPLITS:
            split = [setting.depth * share // sum(shares) for share in shares]
            for scheme in SCHEMES:
                flags = blocks + ("" if scheme == SCHEMES[0] else f" --scheme {scheme}")
                if len(set(split)) > 1:
                    flags += f" --split {','.join(map(str, split))}"
                arms.append(arm("dit", setting, f"{scheme.replace('_', ' ')}, {split}", flags))
    for setting in settings(scale, "ar"):
        blocks = f"{cut(setting, gamma=0)} --next-token-weight 0"
        for scheme in SCHEMES:
            name = f"{scheme.replace('_', ' ')} of the paper's prior"
            arms.append(arm("ar", setting, name, f"{blocks} --paper --scheme {scheme}"))
        arms.append(arm("ar", setting, "equal information", f"{blocks} {setting.fitted}"))
    return arms


STUDY = Study(_arms)
