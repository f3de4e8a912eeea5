"""Text that trained blocks draw, as it is drawn.

Token by token: each starts as noise, and level by level the block that serves the level says what
it may be, given its noise and the tokens before it; the last level's answer is the token. Or all
tokens of a window at once: they are masked at first and open one by one.

A window has as many tokens as a sample had in training. Where it is full, its last half is read
anew as the first one of the next: in training too, windows begin anywhere.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.data.token_files import check_ids
from dbkernels.diffusion.bridges import DEFAULT_BRIDGE, BridgeName, bridge
from dbkernels.diffusion.masked import MASK
from dbkernels.diffusion.process import Interval, Spacing
from dbkernels.diffusion.sharpen import check_sharpening, sharpened
from dbkernels.diffusion.unmask import choose, unmask
from dbkernels.models.cached import CachedReader
from dbkernels.models.family import FamilyModule
from dbkernels.models.reading import Reader, TextWay, WholeReader
from dbkernels.models.registry import family_of
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.settings import check_choice, check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block, block_at
from dbkernels.training.text_bits import own_levels

MOST_LEVELS = 10_000
OF_A_WINDOW = 128  # levels at which masked tokens open, at most, where no number is asked for
KNOWN = -1  # names the noise of known tokens, among a draw's; levels have 0 and up


def text_way(blocks: DiffusionBlocks) -> TextWay:
    """How the family of some blocks makes text.

    Raises:
        ValueError: it makes none.
    """
    entry = family_of(blocks.model)
    if entry is None or entry.writes is None:
        raise ValueError(f"blocks must be of a model of text, got {type(blocks.model).__name__}")
    return entry.writes


def text_levels(
    blocks: DiffusionBlocks,
    count: int | None = None,
    *,
    spacing: Spacing = "cdf",
    stop: float | None = None,
) -> list[float]:
    """Levels at which blocks make text, descending.

    Args:
        blocks:   of a family that makes text
        count:    how many; None is one for each block, so that a token runs every layer once
                  (4 for a single block), or where tokens are unmasked one for each of a window,
                  128 at most
        spacing:  as the process has it
        stop:     the least level, where tokens start as noise; None is the least of all. A token
                  can be read off its noise from about 0.15 down, where every level is one too many
    Raises:
        ValueError: count is too small or too large, the process knows no such spacing, or stop is
            none of its levels, or given where tokens are unmasked or with another spacing than cdf.
    """
    process = blocks.process
    if text_way(blocks) == "unmask":
        if stop is not None:
            raise ValueError(f"stop must not be given where tokens are unmasked, got {stop}")
        own = min(blocks.model.config.length, OF_A_WINDOW)
        return process.grid(own if count is None else count, spacing)
    count = own_levels(len(blocks)) if count is None else count
    check_number("levels", count, 1, MOST_LEVELS)
    if stop is None:
        return process.grid(count, spacing) if count > 1 else [process.range.high]
    if spacing != "cdf":
        raise ValueError(f"spacing must be cdf where a level to stop at is given, got {spacing}")
    low, high = process.range.low, process.range.high
    if not low <= stop < high:
        raise ValueError(f"stop must be from {low} to less than {high}, got {stop}")
    shares = torch.linspace(1, 0, count, dtype=torch.float64)
    return process.level_at(Interval(stop, high), shares).tolist()


class GeneratedText:
    """Some texts that begin with a prompt; iterating draws what follows it.

    Each item is (B, n) int64: the next n tokens of each text. All items together have `count`, and
    the prompt is in none.

    Args:
        blocks:        trained, of a family that makes text; weights must not change meanwhile
        prompt:        (B, P) int64, fewer tokens than a window has; P may be 0
        count:         tokens to draw of each text
        draw:          names what is drawn, from its step on. A text depends on its own place in it,
                       and on the batch by no more than the rounding of a product of matrices
        levels:        of noise, descending; empty is what `text_levels` gives
        bridge:        how a token crosses from one level to the next, as `bridges.bridge` has it;
                       None is DEFAULT_BRIDGE. After argmax the likeliest token of the last level
                       stays, after the others one is drawn there
        temperature:   of the probabilities at a token's first level, where the row that follows is
                       then drawn from them with every bridge; where tokens are unmasked, at each
                       level. None leaves the first level to the bridge
        top_p:         as for `sharpened`, at the same levels
        conventional:  whether the blocks were trained without noise, and so draw without levels
    Raises:
        ValueError: a setting is wrong or does not fit the blocks, the prompt is too long, or a
            token is not in the vocabulary.
    """

    def __init__(
        self,
        blocks: DiffusionBlocks,
        prompt: Tensor,
        count: int,
        draw: Draw,
        *,
        levels: Sequence[float] = (),
        bridge: BridgeName | None = None,
        temperature: float | None = None,
        top_p: float | None = None,
        conventional: bool = False,
    ):
        self.blocks, self.prompt, self.count, self.draw = blocks, prompt, count, draw
        self.way, self.window = text_way(blocks), blocks.model.config.length
        self.conventional, self.levels = conventional, tuple(levels)
        self._sharpens = temperature is not None or top_p is not None
        self._how = {
            "temperature": 1.0 if temperature is None else temperature,
            "top_p": 1.0 if top_p is None else top_p,
        }
        check_number("count", count, 1)
        check_prompt(prompt, self.window, blocks.model.config.vocabulary)
        check_sharpening(**self._how)
        if conventional:
            self._check_conventional(bridge)
        else:
            self.levels = self.levels or tuple(text_levels(blocks))
            self._check_levels()
        if not conventional and self.way != "unmask":
            self.bridge = DEFAULT_BRIDGE if bridge is None else bridge
            check_choice("bridge", self.bridge, get_args(BridgeName))
            if temperature == 0 and self.bridge == "sample":
                raise ValueError(
                    "temperature must be above 0 with the bridge sample, which draws at every "
                    "level; argmax is the bridge that never does"
                )
            self._table = blocks.model.unit_table().detach()
        elif bridge is not None:
            raise ValueError(
                f"bridge must not be given where no token starts as noise, got {bridge}"
            )
        self._readers = {} if self.way == "unmask" else self._make_readers()

    def _check_conventional(self, bridge: BridgeName | None) -> None:
        entry = family_of(self.blocks.model)
        if entry is None or not entry.conventional or len(self.blocks) > 1:
            raise ValueError(
                "conventional must be False but for one block that was trained without noise, got "
                f"{len(self.blocks)} of {type(self.blocks.model).__name__}"
            )
        if self.levels:
            raise ValueError(
                f"levels must not be given where no token starts as noise, got {self.levels}"
            )

    def _check_levels(self) -> None:
        for level in self.levels:
            block_at(self.blocks, level)
        if not all(a > b for a, b in pairwise(self.levels)):
            raise ValueError(f"levels must be descending, got {list(self.levels)}")

    def _make_readers(self) -> dict[FamilyModule, Reader]:
        """One for each model that serves some of the blocks that are asked."""
        asked = {block_at(self.blocks, level).index for level in self.levels}
        orders: dict[FamilyModule, list[Sequence[int]]] = {}
        for block in self.blocks:
            if self.conventional or block.index in asked:
                orders.setdefault(self.blocks.of(block), []).append(block.layers)
        if self.way == "whole":
            # of its own: a step's draw has the noise of the token that is drawn
            return {model: WholeReader(model, self.draw.nth(KNOWN)) for model in orders}
        return {
            model: CachedReader(model, asked, len(self.prompt)) for model, asked in orders.items()
        }

    @property
    def cache_bytes(self) -> int:
        """Of the keys and values that are kept of known tokens, of all texts."""
        return sum(reader.cache_bytes for reader in self._readers.values())

    def __iter__(self) -> Iterator[Tensor]:
        return self._windows() if self.way == "unmask" else self._tokens()

    def _draw(self, step: int) -> Draw:
        return replace(self.draw, step=self.draw.step + step)

    def _tokens(self) -> Iterator[Tensor]:
        known, readers = self.prompt, self._readers.values()
        for reader in readers:
            reader.begin(known)
        for step in range(self.count):
            token = self._token(self._draw(step))
            yield token[:, None]
            known = torch.cat([known, token[:, None]], dim=1)
            if full := known.shape[1] == self.window:
                known = self._last_half(known)
            for reader in readers:
                reader.begin(known) if full else reader.append(token)

    @torch.no_grad()
    def _token(self, draw: Draw) -> Tensor:
        """The next token of each text, (B,)."""
        if self.conventional:
            logits = self._asked(self.blocks[0]).guess(self.blocks[0].layers)
            return _chosen(sharpened(logits.double().softmax(-1), **self._how), draw)
        B, D = len(self.prompt), self._table.shape[1]
        noise = normals(draw, B, D, self._table.device)
        z = self.blocks.process.start(noise, self.levels[0], self.blocks.model.sigma_data)
        for place, level in enumerate(self.levels):
            block, own, name = block_at(self.blocks, level), draw.nth(place), self.bridge
            logits = self._asked(block).denoise(block.layers, z, level)
            probability = logits.double().softmax(-1)
            if not place and self._sharpens:
                probability, name = sharpened(probability, **self._how), "sample"
            if place == len(self.levels) - 1:
                return probability.argmax(-1) if name == "argmax" else _chosen(probability, own)
            following = self.levels[place + 1]
            z = bridge(name)(probability, self._table, z, level, following, own)
        raise AssertionError("the last level answers")

    def _asked(self, block: Block) -> Reader:
        return self._readers[self.blocks.of(block)]

    def _windows(self) -> Iterator[Tensor]:
        known, left, step = self.prompt, self.count, 0
        while left:
            P = known.shape[1]
            tokens = F.pad(known, (0, self.window - P), value=MASK)
            # known tokens are open, and a network expects as many as its level says
            share, least = 1 - P / self.window, self.blocks.process.range.low
            levels = [level * share for level in self.levels if level * share >= least]
            denoiser = self.blocks.denoiser({"token": tokens})
            found = unmask(denoiser, tokens, levels or [least], self._draw(step), **self._how)
            new = found[:, P : P + left]
            yield new
            known, left, step = self._last_half(found), left - new.shape[1], step + 1

    def _last_half(self, known: Tensor) -> Tensor:
        return known[:, self.window - self.window // 2 :]


def check_prompt(prompt: Tensor, window: int, vocabulary: int) -> None:
    """Refuse a prompt that a model cannot read.

    Raises:
        ValueError: it is not (B, P) int64, has no room for a token in the window, or has one that
            is not in the vocabulary.
    """
    if prompt.dim() != 2 or prompt.dtype != torch.int64:
        raise ValueError(f"prompt must be (B, P) int64, got {tuple(prompt.shape)} {prompt.dtype}")
    if prompt.shape[1] >= window:
        raise ValueError(
            f"the prompt must have fewer tokens than the model's window, {window}, got "
            f"{prompt.shape[1]}"
        )
    check_ids(prompt.flatten().cpu().numpy(), vocabulary, "the prompt")


def _chosen(probability: Tensor, draw: Draw) -> Tensor:
    """Tokens (B,) that are drawn from probabilities (B, V)."""
    return choose(probability, uniforms(draw, len(probability), device=probability.device))
