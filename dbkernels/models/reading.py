"""How blocks read a text whose next token is being drawn: what they say of it, from its noise."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from dbkernels.models.family import FamilyModule
from dbkernels.ops.philox import Draw, normals

# how a family makes text: token by token, with the keys and values of known tokens kept, or with
# all of them read again for each; or all tokens of a window at once, which open one by one
TextWay = Literal["cached", "whole", "unmask"]


class Reader(Protocol):
    """Known tokens of some texts, and what blocks make of them.

    cache_bytes:  of what is kept of known tokens
    """

    @property
    def cache_bytes(self) -> int: ...

    def begin(self, tokens: Tensor) -> None:
        """Begin texts anew: known tokens (B, n) int64, fewer than a window has."""

    def append(self, token: Tensor) -> None:
        """The next token of each text, (B,) int64, is known."""

    def denoise(self, layers: Sequence[int], z: Tensor, level: float) -> Tensor:
        """Logits (B, V) of the next token, from z (B, D) at a level, by a block's layers."""

    def guess(self, layers: Sequence[int]) -> Tensor:
        """Logits (B, V) of the next token without noise, as a conventional network gives them."""


class WholeReader:
    """Reads all tokens again whenever it is asked: what any family of text can do.

    Known tokens have noise too where a family reads it: at the level of the token that is being
    drawn, as in training, and the same each time that the level comes again.

    Args:
        model:  a family whose z is (B, S, D)
        draw:   names the noise of known tokens
    """

    cache_bytes = 0

    def __init__(self, model: FamilyModule, draw: Draw):
        self.model, self.draw = model, draw
        self._levels: dict[float, int] = {}

    def begin(self, tokens: Tensor) -> None:
        self._tokens = tokens

    def append(self, token: Tensor) -> None:
        self._tokens = torch.cat([self._tokens, token[:, None]], dim=1)

    def _batch(self) -> dict[str, Tensor]:
        """Known tokens, and one in the place of the next, which nothing before it reads."""
        return {"token": torch.nn.functional.pad(self._tokens, (0, 1))}

    @torch.no_grad()
    def denoise(self, layers: Sequence[int], z: Tensor, level: float) -> Tensor:
        batch = self._batch()
        B, S, D = self.model.z_shape(batch)
        step = self._levels.setdefault(level, len(self._levels))
        noise = normals(Draw(self.draw.seed, step, self.draw.sample), B, S * D, z.device)
        known = self.model.target(batch) + level * noise.view(B, S, D)
        known[:, -1] = z
        levels = torch.full(
            self.model.level_shape(batch), level, dtype=torch.float32, device=z.device
        )
        return self.model.denoise(known, levels, layers, batch)[:, -1]

    @torch.no_grad()
    def guess(self, layers: Sequence[int]) -> Tensor:
        return self.model.guess(layers, self._batch())[:, -1]
