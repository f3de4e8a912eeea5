"""Sizes of the studies: what each family is, how it is trained, and on what.

tiny   took two cores of a CPU 3 to 20 minutes a study
small  has the same data, wider networks and many more updates; nobody has timed it
paper  has the settings of arXiv:2506.14202, appendix E, as they stand there

Where the paper says nothing, the published code is followed, and what that lacks is as here: decay
of the learning rate is none but for the ViT on CIFAR-100, weight decay is 0.01, and texts of LM1B
have windows of 256 tokens. Epochs are counted in updates: CIFAR-100 has 391 batches of 128,
Tiny-ImageNet 391 of 256, CIFAR-10 98 of 512, ImageNet 2,502 of 512, text8 1,373 of 256 windows of
256 characters; 10 epochs are about 150,000 batches of 256 windows of LM1B, and 345,000 of 256
windows of 1,024 tokens of OpenWebText.
"""

from dataclasses import dataclass
from typing import Literal

Scale = Literal["tiny", "small", "paper"]
RATE = "--lr 2e-3 --decay cosine"
IMAGES = f"--batch-size 32 {RATE} --warmup 20"
DRAWN = f"--batch-size 64 {RATE} --warmup 20 --ema 0.99 --label-drop 0.1"
TEXT = f"--dim 64 --num-heads 4 --length 32 --batch-size 12 {RATE} --warmup 50"
MORE_TEXT = f"--dim 128 --num-heads 4 --length 64 --batch-size 8 {RATE} --warmup 50"


@dataclass(frozen=True)
class Setting:
    """A model of one family, the same for every arm.

    A family's first is what most studies train; `more-data` has the others.

    data:       by the name that `Places` knows
    depth:      layers
    blocks:     that it is cut into
    gamma:      overlap of the blocks
    updates:    of every layer
    flags:      of `dbkernels train`, but for depth, blocks and overlap
    fitted:     flags of the prior that is fitted to a text's information; empty for no text
    guidance:   of images that it draws
    """

    data: str
    depth: int
    blocks: int
    gamma: float
    updates: int
    flags: str
    fitted: str = ""
    guidance: float = 1.5


# to where the information of a character, and of a word out of 32,000, lies
CHARACTERS = "--mean -0.55 --std 0.8 --sigma-max 8"
WORDS = "--mean -0.75 --std 0.8 --sigma-max 8"

SETTINGS: dict[Scale, dict[str, tuple[Setting, ...]]] = {
    "tiny": {
        "vit": (
            Setting("digits", 12, 3, 0.05, 300, IMAGES),
            Setting("fashion", 12, 3, 0.05, 600, f"--patch 7 {IMAGES}"),
        ),
        "dit": (
            Setting("digits", 12, 3, 0.05, 600, f"--patch 4 {DRAWN}"),
            Setting("fashion", 12, 3, 0.05, 1600, f"--patch 7 {DRAWN}"),
        ),
        "mdm": (Setting("shakespeare", 6, 3, 0.05, 800, TEXT),),
        "ar": (Setting("shakespeare", 6, 3, 0.1, 800, TEXT, CHARACTERS),),
        "huginn": (Setting("shakespeare", 4, 1, 0.05, 400, TEXT, CHARACTERS),),
    },
    "small": {
        "vit": (
            Setting("fashion", 12, 3, 0.05, 5000, f"--dim 128 {IMAGES} --shift 2"),
            Setting("digits", 12, 3, 0.05, 2000, f"--dim 128 {IMAGES} --shift 1"),
        ),
        "dit": (
            Setting("fashion", 12, 3, 0.05, 20_000, f"--dim 128 {DRAWN}"),
            Setting("digits", 12, 3, 0.05, 2000, f"--dim 128 {DRAWN}"),
        ),
        "mdm": (Setting("shakespeare", 6, 3, 0.05, 10_000, MORE_TEXT),),
        "ar": (Setting("shakespeare", 6, 3, 0.1, 10_000, MORE_TEXT, CHARACTERS),),
        "huginn": (Setting("shakespeare", 4, 1, 0.05, 10_000, MORE_TEXT, CHARACTERS),),
    },
    "paper": {
        "vit": (
            Setting(
                "cifar100", 12, 3, 0.05, 195_500, "--preset published --batch-size 128 --lr 5e-4 "
                "--warmup 3910 --decay cosine --mirror --rand-augment",
            ),
            Setting(
                "tiny-imagenet", 12, 2, 0.05, 39_100, "--preset tiny-imagenet --batch-size 256 "
                "--lr 1e-4 --mirror",
            ),
        ),
        "cnn": (
            Setting("cifar100", 12, 3, 0.1, 391_000, "--batch-size 128 --lr 1e-4 --mirror"),
        ),
        "dit": (
            Setting(
                "cifar10", 12, 3, 0.05, 9800, "--preset S/2 --batch-size 512 --lr 1e-4 "
                "--label-drop 0.1 --mirror", guidance=2.0,
            ),
            Setting(
                "latents", 24, 3, 0.05, 250_200, "--preset L/2 --batch-size 512 --lr 5e-5 "
                "--label-drop 0.1", guidance=2.0,
            ),
        ),
        "mdm": (
            Setting(
                "text8", 12, 3, 0.05, 137_300, "--preset text8 --batch-size 256 --lr 3e-4 "
                "--weight-decay 0.03 --warmup 2000",
            ),
        ),
        "ar": (
            Setting(
                "lm1b", 12, 4, 0.1, 150_000, "--preset paper --length 256 --batch-size 256 "
                "--lr 3e-4 --warmup 2500", WORDS,
            ),
            Setting(
                "owt", 12, 4, 0.1, 345_000, "--preset paper --length 1024 --batch-size 256 "
                "--lr 3e-4 --warmup 2500", WORDS,
            ),
        ),
        "huginn": (
            Setting(
                "lm1b", 8, 1, 0.05, 75_000, "--preset paper --batch-size 256 --lr 3e-4 "
                "--warmup 2500", WORDS,
            ),
        ),
    },
}  # fmt: skip
