"""Ways of training models of text, in bits per character, beside networks trained end to end."""

from dataclasses import replace

from studies.arm import Arm
from studies.families import WHOLE, WITHOUT_NOISE, paper
from studies.scales import Scale, Setting
from studies.study import Study, arm, cut, settings

ALONE = "--next-token-weight 0"
THROUGH = "--clean through --noise-order deepest"
WAYS = {  # of blocks of a language model whose prior is fitted to the text
    "own": ALONE,
    "own, next token": "",
    "through": f"{THROUGH} {ALONE}",
    "through, next token": THROUGH,
    "all of these": f"{THROUGH} --noisy-input z_and_clean",
}
UPDATES = {"small": 1500}  # where many ways are compared; others have as many as their scale


def _arms(scale: Scale) -> list[Arm]:
    arms = []
    for setting in of_text(scale, "mdm"):
        arms.append(arm("mdm", setting, "end to end", WHOLE))
        arms.append(arm("mdm", setting, f"{setting.blocks} blocks", cut(setting)))
    for setting in of_text(scale, "ar"):
        shallow = f"{WITHOUT_NOISE} --depth {setting.depth // setting.blocks}"
        blocks = f"{setting.blocks} blocks"
        arms += [
            arm("ar", setting, "end to end", WITHOUT_NOISE),
            arm("ar", setting, "end to end, as deep as a block", shallow),
            arm("ar", setting, f"{blocks}, the paper's", paper(cut(setting))),
        ]
        fitted = f"{cut(setting)} {setting.fitted} --read-out posterior"
        for name, flags in WAYS.items():
            arms.append(arm("ar", setting, f"{blocks}, {name}", f"{fitted} {flags}"))
    return arms


def of_text(scale: Scale, family: str) -> list[Setting]:
    """The settings of a family of texts with the updates of this study and the least overlap."""
    return [
        replace(each, updates=UPDATES.get(scale, each.updates), gamma=0.05)
        if scale in UPDATES
        else each
        for each in settings(scale, family)
    ]


STUDY = Study(_arms)
