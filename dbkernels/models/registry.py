"""The families by name, and what the rest of the package asks of each: one entry a family.

Training, planning and the command line know a family by its entry alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from dbkernels.data.images import Batch
from dbkernels.diffusion.flow import Flow
from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.masked import Masked
from dbkernels.diffusion.process import Process
from dbkernels.diffusion.timesteps import Timesteps
from dbkernels.models import ar, dit, huginn, mdm, mmdit, vit
from dbkernels.models.family import FamilyModule, Presets, Weighting
from dbkernels.models.model_config import ModelConfig
from dbkernels.models.reading import TextWay
from dbkernels.models.start import Start
from dbkernels.settings import check_choice

TextNoise = Literal["masked", "gaussian"]


@dataclass(frozen=True)
class FamilyEntry:
    """What a family is outside its own file."""

    summary: str
    """What it does, after its name."""
    model: type[Presets]
    """A `Family` with `presets`, made from a configuration."""
    config: type[ModelConfig]
    """Of its model."""
    process: Process
    """The noise, where nobody says another."""
    paper: Process
    """The noise of the paper."""
    weighting: Weighting
    """Of the noise levels in the loss, likewise."""
    num_blocks: int = 3
    """Blocks that its layers are cut into, likewise."""
    conventional: str = ""
    """What its model's `conventional_loss` trains; empty where it has none: one block is it."""
    recurs: bool = False
    """Whether a conventional step draws how often layers run, which no CUDA graph can do."""
    guided: bool = False
    """Whether a model has a batch that asks for nothing, `unconditional`, which guidance needs."""
    metrics: Callable[[Tensor, Batch], dict[str, Tensor]] | None = None
    """(prediction, batch) -> numbers (B,) of the samples, by name; None where only losses count.
    Where confidence comes with accuracy, an evaluation also has the calibration error."""
    average: Callable[[Tensor], Tensor] | None = None
    """Predictions of several starts (N, B, ...) -> one (B, ...); None where they have no mean."""
    text: TextNoise | None = None
    """What noise does to a text, which says how its bits are bounded: it masks tokens, or moves
    their embeddings; None is no model of text."""
    prompts: Callable[[Any, Path | None, int, torch.device], Batch] | None = None
    """(config, file of prompts, number of each class or prompt, device) -> what to sample; None
    where it draws no images."""
    writes: TextWay | None = None
    """How it makes text. cached or whole: token by token, with what layers keep of known ones, or
    all of them read again for each. unmask: a window at once, whose tokens open one by one."""
    start: Start = field(default_factory=Start)
    """How its blocks start from a network that was trained end to end."""
    other_noise: Mapping[str, Process] = field(default_factory=dict)
    """The noise of models whose configuration has another process than the family's own."""

    def process_of(self, config: ModelConfig) -> Process:
        """The noise of a model where nobody says another."""
        return self.other_noise.get(getattr(config, "process", ""), self.process)


# where a token's information lies for 32,000 words: below 0.05 it is read off z, and above 8 less
# than 0.01 nats of it are in z
OF_WORDS = LogNormal(mean=-0.75, std=0.8, sigma_min=0.05, sigma_max=8.0)

# settings of a model of text that its weights do not know, and those that only noise uses
OF_TEXT = ("recompute", "length")
OF_NOISE = ("read_out", "levels_of", "sigma_data")

FAMILIES = {
    "vit": FamilyEntry(
        summary="classifies images",
        model=vit.ViT,
        config=vit.ViTConfig,
        # below the least level the label is read off z, and a block need not look at the image
        process=LogNormal(sigma_min=0.4),
        paper=LogNormal(),
        # cross-entropy is better without a weight, as in the code of arXiv:2506.14202
        weighting="none",
        metrics=vit.metrics,
        average=vit.average,
    ),
    "dit": FamilyEntry(
        summary="generates images",
        model=dit.DiT,
        config=dit.DiTConfig,
        process=LogNormal(),
        paper=LogNormal(),
        weighting="process",
        guided=True,
        prompts=dit.prompts,
        other_noise={"flow": Flow(), "vp": Timesteps()},
    ),
    "mmdit": FamilyEntry(
        summary="generates images from texts",
        model=mmdit.MMDiT,
        config=mmdit.MMDiTConfig,
        process=Flow(),
        paper=Flow(),
        weighting="process",
        guided=True,
        prompts=mmdit.prompts,
        other_noise={"gaussian": LogNormal(), "vp": Timesteps()},
    ),
    "mdm": FamilyEntry(
        summary="fills the gaps of a text",
        model=mdm.MDM,
        config=mdm.MDMConfig,
        process=Masked(),
        paper=Masked(),
        weighting="process",
        text="masked",
        writes="unmask",
        start=Start(free=OF_TEXT),
    ),
    "ar": FamilyEntry(
        summary="writes text, token by token",
        model=ar.AR,
        config=ar.ARConfig,
        process=OF_WORDS,
        paper=LogNormal(),
        weighting="none",
        text="gaussian",
        writes="cached",
        start=Start(
            free=(*OF_TEXT, "clean", "next_token_weight", "next_token_from"),
            free_without_noise=("noisy_input", *OF_NOISE),
            as_blocks=ar.ARConfig.as_blocks,
            add_noise=ar.AR.add_noise,
            noise_order="deepest",
        ),
        conventional="the next token, from clean ones alone",
    ),
    "huginn": FamilyEntry(
        summary="writes text too, with few layers that run again and again",
        model=huginn.Huginn,
        config=huginn.HuginnConfig,
        process=OF_WORDS,
        paper=LogNormal(),
        weighting="none",
        text="gaussian",
        writes="whole",
        start=Start(
            free=(*OF_TEXT, "recurrences", "truncation"),
            free_without_noise=OF_NOISE,
            as_blocks=huginn.HuginnConfig.as_blocks,
            add_noise=huginn.Huginn.add_noise,
        ),
        num_blocks=1,
        conventional="recurrences from noise, the last of them by backpropagation",
        recurs=True,
    ),
}

if TYPE_CHECKING:
    FamilyName = str
else:
    FamilyName = Literal[tuple(FAMILIES)]
DEFAULT_FAMILY: FamilyName = next(iter(FAMILIES))


def family_named(name: str) -> FamilyEntry:
    """The entry of a family.

    Raises:
        ValueError: there is no such family.
    """
    check_choice("family", name, FAMILIES)
    return FAMILIES[name]


def family_with(preset: str) -> FamilyName:
    """The first family that has a preset of this name; the default one where it is empty.

    Raises:
        ValueError: none has it.
    """
    if not preset:
        return DEFAULT_FAMILY
    every = [name for entry in FAMILIES.values() for name in entry.model.presets]
    check_choice("preset", preset, list(dict.fromkeys(every)))
    return next(name for name, entry in FAMILIES.items() if preset in entry.model.presets)


def family_of(model: FamilyModule) -> FamilyEntry | None:
    """The entry of a model's family; None where it is of none of them."""
    return next((entry for entry in FAMILIES.values() if isinstance(model, entry.model)), None)
