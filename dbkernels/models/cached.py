"""A text that is read token by token: layers keep the keys and values of the tokens that are known.

Clean row i is the token before x_i, BOS for the first, and the noisy row of x_i reads clean rows up
to i and itself. Clean row i lies in slot i of the cache. The noisy row of x_i lies in slot i + 1,
where clean row i + 1 then takes its place: so attention is causal by slots, and a noisy row differs
from a clean one by its condition and its position alone, which is i as well.

    bytes of the cache = 2 D (S + 1) bytes of a number, for each sample and each layer

as an ordinary model's of the same depth has, but for the one slot. Blocks whose clean streams pass
through the same layers from the start keep one cache of these between them. A clean row is computed
when a block first asks for it, with the noisy row of the same block, so that each weight is read
once for both. The condition of clean rows is constant, and that of noisy ones is one of a few, so
what layers make of them is computed once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dbkernels.diffusion.path import log_level
from dbkernels.models.family import FamilyModule
from dbkernels.models.layer import AdaLNLayer
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import reference


def cached_layer(
    layer: AdaLNLayer,
    x: Tensor,
    modulation: Tensor,
    rotary: Tensor,
    cache: Tensor,
    *,
    first: int,
    answers: int | None = None,
) -> Tensor:
    """One layer on the newest rows of a text; those before them are in its cache.

    Args:
        x:           (B, R, D)            residual stream of R rows, which lie in slots that follow
                                          each other
        modulation:  (1 or B, R, 6 D)     of `AdaLNLayer.modulated`
        rotary:      (2, R, d)            of the rows' positions
        cache:       (2, B, H, slots, d)  keys and values by slot; those of the rows are written
        first:       slot of the first row: row r reads slots 0 to first + r
        answers:     the last so many rows' results alone; None is R
    Returns:
        (B, answers, D), dtype of x.
    """
    config, w, rows = layer.config, layer.weights(), x.shape[1]
    H, last = config.num_heads, first + rows
    answers = rows if answers is None else answers
    shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=-1)
    of_norm = {"norm": config.norm, "eps": config.eps}
    y = reference.adaln_norm(x, scale1, shift1, **of_norm).to(w.qkv_weight.dtype)
    qkv = reference.projected(y, w.qkv)
    norms = {"q_weight": w.q_weight, "k_weight": w.k_weight, "eps": config.qk_eps}
    q, k = reference.qk_norm_rotary(qkv, H, **norms, rotary=rotary)
    v = qkv.unflatten(-1, (3, H, -1))[:, :, 2]
    cache[0, :, :, first:last], cache[1, :, :, first:last] = k.transpose(1, 2), v.transpose(1, 2)

    x, q, gate1, shift2, scale2, gate2 = (
        t[:, rows - answers :] for t in (x, q, gate1, shift2, scale2, gate2)
    )
    # of one row nothing is hidden
    mask = None if answers == 1 else _causal(answers, last, x.device)
    keys, values = cache[:, :, :, :last]
    h = F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=mask)
    h = reference.projected(h.transpose(1, 2).flatten(2), w.out)
    x = reference.gated_residual(x, h, gate1).to(x.dtype)
    if config.eps2 is not None:
        of_norm["eps"] = config.eps2
    y = reference.adaln_norm(x, scale2, shift2, **of_norm).to(w.fc1_weight.dtype)
    u = ACTIVATIONS[config.mlp](reference.projected(y, w.fc1))
    return reference.gated_residual(x, reference.projected(u, w.fc2), gate2).to(x.dtype)


ACTIVATIONS = {
    "gelu": reference.gelu,
    "gelu_exact": reference.gelu_exact,
    "swiglu": reference.swiglu,
}


def _causal(rows: int, keys: int, device: torch.device) -> Tensor:
    """(rows, keys) bool: the last row reads every key, and each before it one less."""
    return torch.ones((rows, keys), dtype=torch.bool, device=device).tril(keys - rows)


@dataclass(eq=False)
class _Place:
    """A layer behind certain others in the clean stream.

    cache:      of `cached_layer`
    of_clean:   (1, 1, 6 D) modulation of clean rows
    of_level:   the same of noisy ones, by their level
    passes_on:  whether another place reads the clean rows that it leaves
    left:       what it left of the newest clean rows, the last or all of them; None before it ran
    """

    layer: AdaLNLayer
    cache: Tensor
    of_clean: Tensor
    of_level: dict[float, Tensor]
    passes_on: bool = False
    left: Tensor | None = None


class CachedReader:
    """Reads texts for blocks of a model with a clean and a noisy stream; a `Reader`.

    Args:
        model:   of the autoregressive family, in place; its weights must not change meanwhile
        orders:  layers of each block that will be asked
        B:       number of texts
    """

    def __init__(self, model: FamilyModule, orders: Sequence[Sequence[int]], B: int):
        self.model, self.B = model, B
        config, device = model.config, model.clean_table.weight.device
        self._conditions: dict[float, Tensor] = {}
        places: dict[tuple[int, ...], _Place] = {}
        self._paths: dict[tuple[int, ...], list[_Place]] = {}
        with torch.no_grad():
            self._table = model.read_table()
            for layers in map(tuple, orders):
                order = *model.before(layers), *layers
                for n, index in enumerate(order, 1):
                    if order[:n] not in places:
                        places[order[:n]] = self._place(model.layers[index])
                path = self._paths[layers] = [places[order[:n]] for n in range(1, len(order) + 1)]
                for place in path[:-1]:
                    place.passes_on = True
        self._places = list(places.values())
        positions = torch.arange(config.length + 1, device=device)
        self._rotary = rotary_table(positions, config.dim // config.num_heads)
        self._rows, self._first = self._rotary[0, :0], 0  # what `begin` gives

    def _place(self, layer: AdaLNLayer) -> _Place:
        config, weight = layer.config, layer.attention.qkv.weight
        H, slots = config.num_heads, self.model.config.length + 1
        cache = weight.new_zeros((2, self.B, H, slots, config.attention_width // H))
        return _Place(layer, cache, _modulation(layer, self.model.clean_condition[None, None]), {})

    @property
    def cache_bytes(self) -> int:
        """Of all keys and values that are kept."""
        return sum(place.cache.nbytes for place in self._places)

    def begin(self, tokens: Tensor) -> None:
        """Begin texts anew: known tokens (B, n) int64, fewer than a window has."""
        bos = tokens.new_full((self.B, 1), self.model.config.vocabulary)
        self._read(torch.cat([bos, tokens], dim=1), 0)

    def append(self, token: Tensor) -> None:
        """The next token of each text, (B,) int64, is known."""
        self._read(token[:, None], self._first + self._rows.shape[1])

    @torch.no_grad()
    def _read(self, tokens: Tensor, first: int) -> None:
        self._rows, self._first = self.model.clean_table(tokens), first
        for place in self._places:
            place.left = None

    @torch.no_grad()
    def denoise(self, layers: Sequence[int], z: Tensor, level: float) -> Tensor:
        """Logits (B, V) of the next token, from z (B, D) at a level, by a block's layers."""
        sigma = torch.full((1,), level, dtype=torch.float32, device=z.device)
        z, path = z[:, None], self._paths[tuple(layers)]
        if level not in self._conditions:
            self._conditions[level] = self.model.condition(log_level(sigma))[:, None]
        c, clean = self._conditions[level], self._rows
        for place in path[: -len(layers)]:
            clean = self._pass(place, clean)
        x = self.model.enter(z, sigma, clean[:, -1:])
        for place in path[-len(layers) :]:
            if level not in place.of_level:
                place.of_level[level] = _modulation(place.layer, c)
            x, clean = self._both(place, x, clean, place.of_level[level])
        rows = self.model.head.noisy(x, c[:, 0].expand(self.B, -1), z, sigma)
        return self.model.head.logits(rows, self._table)[:, 0]

    @torch.no_grad()
    def guess(self, layers: Sequence[int]) -> Tensor:
        """Logits (B, V) of the next token by the clean stream alone."""
        x = self._rows
        for place in self._paths[tuple(layers)]:
            x = self._pass(place, x)
        c = self.model.clean_condition.expand(self.B, -1)
        rows = self.model.head.clean(x[:, -1:], c)
        return self.model.head.logits(rows, self._table)[:, 0]

    def _pass(self, place: _Place, clean: Tensor) -> Tensor:
        """What a place leaves of the newest clean rows."""
        if place.left is None:
            n = clean.shape[1]
            rotary = self._rotary[:, self._first : self._first + n]
            place.left = cached_layer(
                place.layer,
                clean,
                place.of_clean.expand(-1, n, -1),
                rotary,
                place.cache,
                first=self._first,
                answers=None if place.passes_on else 1,
            )
        return place.left

    def _both(
        self, place: _Place, x: Tensor, clean: Tensor, modulation: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What a place leaves of the noisy row, and of the clean ones, which it runs once."""
        n, first = self._rows.shape[1], self._first
        alone = place.left is not None
        rotary = self._rotary[:, first + n - 1 : first + n]
        if not alone:
            x = torch.cat([clean, x], dim=1)
            modulation = torch.cat([place.of_clean.expand(-1, n, -1), modulation], dim=1)
            rotary = torch.cat([self._rotary[:, first : first + n], rotary], dim=1)
        x = cached_layer(
            place.layer,
            x,
            modulation,
            rotary,
            place.cache,
            first=first + n if alone else first,
            answers=None if place.passes_on else 1,
        )
        if not alone:
            place.left = x[:, :-1]
        return x[:, -1:], place.left


def _modulation(layer: AdaLNLayer, c: Tensor) -> Tensor:
    """(1, 1, 6 D) of a condition (1, 1, cond_dim)."""
    return layer.modulated(layer.modulation(F.silu(c)))
