"""Bits of a text: the figures, and how the text is read for them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch

from dbkernels.data.images import Batch, Data
from dbkernels.data.spaced import Spaced
from dbkernels.diffusion.likelihood import Curve
from dbkernels.ops.philox import Draw
from dbkernels.training.evaluation import Passes, batches

OF_ONE_BLOCK = 4  # levels of a token, where one block serves them all
MOST_LOGITS = 2**26  # that are formed at a time: 256 MiB


def own_levels(num_blocks: int) -> int:
    """Levels of a token where no number is asked for.

    One for each block, so that a token runs every layer once, or OF_ONE_BLOCK for a single block.
    """
    return num_blocks if num_blocks > 1 else OF_ONE_BLOCK


class TextData(Data, Protocol):
    """Windows of text, such as `TokenData`: a batch has "token", (B, S) int64.

    It may also say `characters_per_token`; what does not has one.

    vocabulary:  number of ids, V
    length:      tokens of a window, S
    """

    vocabulary: int
    length: int


@dataclass(frozen=True)
class Reading:
    """How a text is read: its windows, and the noise and the size of their batches."""

    data: TextData
    windows: int
    """Of the text that are read, evenly spaced; all where it has no more."""
    seed: int
    """Of the noise."""
    batch_size: int
    """Windows at a time; fewer where their logits would need more room."""
    passes: Passes = field(default_factory=Passes)
    """That were made with windows of it."""

    def __len__(self) -> int:
        """Number of windows."""
        return min(self.windows, len(self.data))

    @property
    def tokens(self) -> int:
        """In all of them."""
        return len(self) * self.data.length

    @property
    def unit(self) -> float:
        """Bits per character for each nat per token."""
        return 1 / (math.log(2) * getattr(self.data, "characters_per_token", 1.0))

    def batches(self, device: torch.device) -> Iterator[tuple[Batch, Draw]]:
        """As `evaluation.batches`."""
        room = max(MOST_LOGITS // (self.data.length * self.data.vocabulary), 1)
        some = Spaced(self.data, len(self))
        return batches(some, min(self.batch_size, room), device, seed=self.seed)


@dataclass(frozen=True)
class SamplerBits:
    """What a text costs under the sampler itself; `text_sampler` says how it is estimated.

    bits:     per character; too high where there are few starts
    once:     the same of the first answer alone, at the greatest level
    levels:   of the sampler, descending
    starts:   from noise, whose probabilities were averaged
    bridge:   from one level to the next
    windows:  of the text that were read for it
    tokens:   of them that were sampled
    """

    bits: float
    once: float
    levels: tuple[float, ...]
    starts: int
    bridge: str
    windows: int
    tokens: int


@dataclass(frozen=True)
class TextEvaluation:
    """What trained blocks are worth on a text, in bits per character; printed as a few lines.

    bits:        the figure to compare: the least bound, or exact where the network has no noise
    blocks:      what each block adds to the bound that has all of them in it, the most noise first
    windows:     of the text that were read
    tokens:      in them
    stop:        level at which the least bound stops, chosen on this text; None but for noise on
                 embeddings, as are the next four
    least:       the bound that has all blocks in it, which stops at the least level
    most_noise:  cross-entropy at the greatest level, exact for a sampler that asks once, there
    curves:      of the blocks, per token and in nats
    sampler:     what the text costs under the sampler
    """

    bits: float
    blocks: tuple[float, ...]
    windows: int
    tokens: int
    stop: float | None = None
    least: float | None = None
    most_noise: float | None = None
    curves: tuple[Curve, ...] = ()
    sampler: SamplerBits | None = None

    def __str__(self) -> str:
        lines = {"bits per character": f"{self.bits:.4g}"}
        if self.stop is not None:
            lines |= {
                "where the bound stops": f"{self.stop:.4g}",
                "down to the least level": f"{self.least:.4g}",
                "at the most noise": f"{self.most_noise:.4g}",
            }
        lines["of each block"] = "  ".join(f"{bits:.4g}" for bits in self.blocks)
        if found := self.sampler:
            lines["of the sampler"] = (
                f"{found.bits:.4g}  ({found.bridge}, {len(found.levels)} levels, "
                f"{found.starts} starts, {found.windows} windows)"
            )
        lines["read"] = f"{self.windows} windows of {self.tokens // max(self.windows, 1)} tokens"
        width = max(map(len, lines))
        return "\n".join(f"{name:{width}}  {figure}" for name, figure in lines.items())
