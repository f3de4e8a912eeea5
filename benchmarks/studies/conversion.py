"""Blocks that start from a network trained end to end, by how they are trained on.

Beside them are the network itself, the same trained on end to end, and blocks that start from
nothing and have as many updates as the others.
"""

import re
from dataclasses import replace

from show import Row

from dbkernels import DiffusionBlocks
from dbkernels.data.images import Data
from studies.arm import Arm
from studies.families import WHOLE, WITHOUT_NOISE
from studies.measuring import Sizes
from studies.scales import RATE, Scale, Setting
from studies.study import Study, arm, cut, settings
from studies.text import ALONE, of_text

SOURCE = "end to end"
ON: dict[Scale, int] = {"tiny": 100, "small": 200, "paper": 10_000}  # updates after the source's
GENTLE = {"ar": "--lr 5e-4 --warmup 20", "dit": "--lr 1e-3 --warmup 20"}  # it has learned already
LIKE = "--clean through --noise-order deepest --noisy-input z_and_clean --read-out posterior"
WHOLE_GUESS = "--next-token-from network"
STILL = "--lr 1e-12 --ema 0"  # a step that moves nothing
UNTRAINED = "untrained"
WAYS = {  # of blocks that start from the source
    "ar": {
        UNTRAINED: STILL,
        "alone": ALONE,
        "distilled": f"{ALONE} --distill 1",
        "clean loss": "",
        "distilled, clean loss": "--distill 1",
        "whole clean loss": WHOLE_GUESS,
        "distilled, whole clean loss": f"{WHOLE_GUESS} --distill 1",
        "own, alone": f"{ALONE} --clean own",
        "own, clean loss": "--clean own",
    },
    "dit": {
        UNTRAINED: STILL,
        "alone": "",
        "half distilled": "--distill 0.5",
        "distilled": "--distill 1",
    },
}
DRAWN = f"--batch-size 64 {RATE} --warmup 50 --ema 0.99 --label-drop 0.1"
DIGITS: dict[Scale, Setting] = {"small": Setting("digits", 6, 3, 0.05, 600, DRAWN)}


def _arms(scale: Scale) -> list[Arm]:
    text, images = of_text(scale, "ar")[0], DIGITS.get(scale) or settings(scale, "dit")[0]
    return [
        *_of_family("ar", text, scale, WITHOUT_NOISE, LIKE),
        *_of_family("dit", images, scale, WHOLE, ""),
    ]


def _of_family(family: str, setting: Setting, scale: Scale, whole: str, like: str) -> list[Arm]:
    source = arm(family, setting, SOURCE, whole)
    few, blocks = replace(setting, updates=ON[scale]), f"{setting.blocks} blocks"
    cuts = f"{cut(setting)} {setting.fitted}"
    # the source has the sizes
    flags = re.sub(r"--preset \S+", "", setting.flags)
    started = replace(few, flags=flags if scale == "paper" else f"{flags} {GENTLE[family]}")

    def on(name: str, own: str) -> Arm:
        return replace(arm(family, started, name, own), source=source)

    arms = [
        source,
        on(f"{SOURCE}, trained on", whole),
        arm(family, few, f"{blocks} from nothing", f"{cuts} {like}"),
    ]
    for name, own in WAYS[family].items():
        found = on(f"{blocks}, {name}", f"{cuts} {own}")
        arms.append(replace(found, updates=1) if name == UNTRAINED else found)
    return arms


def _ordinary(blocks: DiffusionBlocks, data: Data, seed: int, sizes: Sizes) -> Row:
    """Bits of a text by all layers as an ordinary network, which the source was trained as."""
    if not blocks.text:
        return {}
    whole = DiffusionBlocks(blocks.model, 1, process=blocks.process)
    found = whole.evaluate_conventional(data, samples=sizes.windows)
    return {"bits_without_noise": found.bits}


STUDY = Study(_arms, more=_ordinary)
