"""A layer that reads known tokens from its cache is the layer that reads them all."""

import pytest
import torch
from models.tiny import randomise

from dbkernels.models.cached import cached_layer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.models.rotary import rotary_table

SIZES = {"dim": 8, "num_heads": 2, "mlp_hidden": 6, "cond_dim": 5}
B, T = 3, 7
OPTIONS = {
    "text": {"norm": "rms", "mlp": "swiglu", "bias": False},
    "plain": {},
    "affine": {"affine": True, "eps": 0.1, "eps2": 0.7, "mlp": "gelu_exact"},
    "heads": {"qk_norm": True, "qk_eps": 0.3, "head_dim": 6, "silu_modulation": True},
}


def causal(layer, x, c, rotary):
    """All rows at once."""
    return run_layers([layer], x, c, rotary, attention="causal")


def empty_cache(layer, dtype):
    """With room to spare, in which nothing may be read."""
    H, width = layer.config.num_heads, layer.config.attention_width
    return torch.full((2, B, H, T + 2, width // H), torch.nan, dtype=dtype)


def in_pieces(layer, x, c, rotary, sizes, answers=None):
    """A few rows at a time, each with those before it in the cache."""
    first, found, cache = 0, [], empty_cache(layer, x.dtype)
    for size in sizes:
        rows = slice(first, first + size)
        modulation = layer.modulated(layer.modulation(torch.nn.functional.silu(c[:, rows])))
        given = x[:, rows], modulation, rotary[:, rows], cache
        found.append(cached_layer(layer, *given, first=first, answers=answers))
        first += size
    return found


@pytest.fixture(params=OPTIONS)
def case(request):
    torch.manual_seed(0)
    layer = randomise(AdaLNLayer(LayerConfig(**SIZES, **OPTIONS[request.param]))).double()
    width = layer.config.attention_width // 2
    x, c = torch.randn(B, T, 8), torch.randn(B, T, 5)
    return layer, x.double(), c.double(), rotary_table(torch.arange(T), width)


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * T, [4, 1, 2], [T]])
def test_rows_that_come_later_are_what_they_are_all_at_once(case, sizes):
    found = torch.cat(in_pieces(*case, sizes), dim=1)
    torch.testing.assert_close(found, causal(*case), rtol=0, atol=1e-12)


@torch.no_grad()
def test_the_last_rows_alone_are_those_of_all(case):
    whole = in_pieces(*case, [4, 3])
    for answers in (1, 2):
        few = in_pieces(*case, [4, 3], answers=answers)
        for rows, all_rows in zip(few, whole, strict=True):
            torch.testing.assert_close(rows, all_rows[:, -answers:], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_row_takes_the_place_of_one_that_was_noise(case):
    layer, x, c, rotary = case
    modulation = layer.modulated(layer.modulation(torch.nn.functional.silu(c)))
    cache = empty_cache(layer, x.dtype)

    def run(given, first):
        rows = slice(first, first + given.shape[1])
        told = modulation[:, rows], rotary[:, rows], cache
        return cached_layer(layer, given, *told, first=first)

    run(x[:, :3], 0)
    run(torch.randn(B, 1, 8, dtype=x.dtype), 3)
    found = torch.cat([run(x[:, 3:4], 3), run(x[:, 4:], 4)], dim=1)
    torch.testing.assert_close(found, causal(*case)[:, 3:], rtol=0, atol=1e-12)
