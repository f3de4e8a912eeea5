"""How layers space the classes, end to end and in blocks, and blocks that are cut where it changes.

A public conjecture sees phases of a network in this curve and a block in each. So the third arm has
its layers cut at the seams of the end-to-end network's curve, beside an even cut. The curve is that
of the test images on which the arm is then measured, which can only favour it.
"""

from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

import numpy as np
from isometry import Mode, seams, split_at, sweep
from show import Row

from dbkernels import DiffusionBlocks
from dbkernels.data.images import Data
from studies.arm import Arm
from studies.families import MOST_NOISE
from studies.measuring import Sizes
from studies.scales import Scale
from studies.study import Study, arm, cut, settings

WHOLE = "end to end"


def _arms(scale: Scale) -> list[Arm]:
    arms = []
    for setting in settings(scale, "vit"):
        arms.append(arm("vit", setting, WHOLE, MOST_NOISE))
        arms.append(arm("vit", setting, f"{setting.blocks} blocks, even", cut(setting)))
    return arms


def _at_seams(scale: Scale, rows: Sequence[Row]) -> list[Arm]:
    """Blocks that are cut at the seams of the mean curve over the seeds."""
    arms = []
    for setting in settings(scale, "vit"):
        curves = [
            row["sweeps"]["trajectory"]["r"]
            for row in rows
            if (row["data"], row["arm"]) == (setting.data, WHOLE)
        ]
        if not curves:
            continue
        split = split_at(seams(np.mean(curves, 0).tolist(), setting.blocks), setting.depth)
        name = f"{setting.blocks} blocks, cut at the seams {list(split)}"
        flags = f"{cut(setting)} --split {','.join(map(str, split))}"
        arms.append(arm("vit", setting, name, flags))
    return arms


def _sweeps(blocks: DiffusionBlocks, data: Data, seed: int, sizes: Sizes) -> Row:
    """The curve for both ways of pairing layers with answers."""
    samples = min(sizes.images, len(data))
    found = [sweep(blocks, data, mode=m, seed=seed, samples=samples) for m in get_args(Mode)]
    return {"sweeps": {each.mode: asdict(each) for each in found}}


STUDY = Study(_arms, then=_at_seams, more=_sweeps)
