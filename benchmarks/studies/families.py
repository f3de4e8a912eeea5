"""Every family: end to end, a network of one block's depth, and blocks.

`families` has the first of the data that a scale has for a family, `more-data` has the others.
"""

from functools import partial

from studies.arm import Arm
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

WHOLE = "--num-blocks 1"
# at the most noise alone a classifier is the ordinary one, which is harder to beat
MOST_NOISE = f"{WHOLE} --sigma-min 79"
WITHOUT_NOISE = f"{WHOLE} --objective conventional"
# a conventional step's forwards of one layer over those of one pass, 3 (c + e):
# r c + e + 2 (k c + e), of r recurrences, k of them with a gradient, c layers of the core and e
# others: 9, 4, 2 and 2 of the small preset, 33, 8, 4 and 4 of the paper's. r is one more than
# --recurrences, for a step's number is 1 + Poisson
SAME_ARITHMETIC = {"tiny": 40 / 12, "small": 40 / 12, "paper": 208 / 24}
FIRST, OTHERS, ALL = slice(1), slice(1, None), slice(None)  # of the data of a family
RECOMMENDED = "--clean through --noise-order deepest --read-out posterior"


def _arms(which: slice, scale: Scale) -> list[Arm]:
    arms = []
    for family, whole in (("vit", MOST_NOISE), ("dit", WHOLE), ("mdm", WHOLE)):
        for setting in settings(scale, family)[which]:
            shallow = f"{whole} --depth {setting.depth // setting.blocks}"
            arms += [
                arm(family, setting, "end to end", whole),
                arm(family, setting, "end to end, as deep as a block", shallow),
                arm(family, setting, f"{setting.blocks} blocks", cut(setting)),
            ]
            if family == "vit":
                # down to levels where the label can be read off the noise
                name = f"{setting.blocks} blocks, the paper's prior"
                arms.append(arm(family, setting, name, f"{cut(setting)} --paper"))
    for setting in settings(scale, "ar")[which]:
        shallow = f"{WITHOUT_NOISE} --depth {setting.depth // setting.blocks}"
        blocks = cut(setting)
        arms += [
            arm("ar", setting, "end to end", WITHOUT_NOISE),
            arm("ar", setting, "end to end, as deep as a block", shallow),
            arm("ar", setting, f"{setting.blocks} blocks, the paper's", paper(blocks)),
            arm("ar", setting, f"{setting.blocks} blocks, recommended",
                f"{blocks} {setting.fitted} {RECOMMENDED}"),
        ]  # fmt: skip
    return arms + recurrent(scale, which)


def paper(blocks: str) -> str:
    """Flags of a language model in blocks as in the paper."""
    return f"{blocks} --paper --next-token-weight 0"


def recurrent(scale: Scale, which: slice = ALL) -> list[Arm]:
    """Recurrent depth: its layers run again and again, or once with as many updates, or once with
    as much arithmetic."""
    arms = []
    for setting in settings(scale, "huginn")[which]:
        one = f"{WHOLE} {setting.fitted}"
        arms += [
            arm("huginn", setting, "recurrent", WITHOUT_NOISE),
            arm("huginn", setting, "one pass, as many updates", one),
            arm(
                "huginn", setting, "one pass, as much arithmetic", one, times=SAME_ARITHMETIC[scale]
            ),
        ]
    return arms


STUDY, MORE_DATA = Study(partial(_arms, FIRST)), Study(partial(_arms, OTHERS))
