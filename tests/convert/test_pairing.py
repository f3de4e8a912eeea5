"""Rows that are paired by neighbours, and by halves: there and back, and what they compute."""

import pytest
import torch
from convert.fused_cases import WIDE, Rotary, lightning
from torch import nn

from dbkernels.convert import fuse
from dbkernels.convert.pairing import (
    halves_of_neighbours,
    neighbours_of_halves,
    qkv_by_halves,
    table_by_halves,
)
from dbkernels.ops import qk_norm_rotary


@pytest.mark.parametrize(("d", "heads"), [(2, 1), (6, 1), (4, 3), (10, 2)])
def test_the_order_there_and_back_are_each_others_inverse(d, heads):
    there, back = halves_of_neighbours(d, heads), neighbours_of_halves(d, heads)
    rows = torch.randn(heads * d, 3)
    assert torch.equal(rows[there][back], rows)
    assert torch.equal(rows[back][there], rows)
    by_halves = rows[there].view(heads, 2, d // 2, 3)
    assert torch.equal(by_halves[:, 0], rows.view(heads, d, 3)[:, ::2])
    assert torch.equal(by_halves[:, 1], rows.view(heads, d, 3)[:, 1::2])
    order = qkv_by_halves(d, heads)
    assert torch.equal(order.view(3, -1)[0], there)
    assert torch.equal(order.view(3, -1)[1], there + heads * d)
    assert torch.equal(order.view(3, -1)[2], torch.arange(2 * heads * d, 3 * heads * d))


def test_permuted_rows_turned_by_halves_are_the_rows_turned_by_neighbours():
    T, H, d = 4, 3, WIDE
    rope, order = Rotary(2, d), halves_of_neighbours(d)
    qkv = torch.randn(2, T, 3, H, d)
    table = table_by_halves(rope.freqs_cos, rope.freqs_sin)
    assert table.dtype == torch.float32
    turned = qk_norm_rotary(qkv[..., order].flatten(2), H, rotary=table)
    for each, place in zip(turned, (0, 1), strict=True):
        expected = rope(qkv[:, :, place].transpose(1, 2)).transpose(1, 2)
        torch.testing.assert_close(each, expected[..., order])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: halves_of_neighbours(5), "d must be even to be paired, got 5"),
        (lambda: neighbours_of_halves(0, 2), "d must be even to be paired, got 0"),
        (lambda: qkv_by_halves(3, 2), "d must be even to be paired, got 3"),
        (lambda: table_by_halves(torch.ones(3), torch.ones(3)), r"must be \(T, d\) .*, got \(3,\)"),
        (lambda: table_by_halves(torch.ones(3, 4), torch.ones(3, 2)), r"got \(3, 4\) and \(3, 2\)"),
        (lambda: table_by_halves(torch.ones(3, 5), torch.ones(3, 5)), "with an even d"),
        (lambda: table_by_halves(torch.eye(4), torch.ones(4, 4)), "one angle for each pair"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()


class Skewed(Rotary):
    def forward(self, t):
        return super().forward(t) * 1.01


def one_of(rope, *names):
    for name in names:
        delattr(rope, name)
    return rope


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        (lambda: nn.Identity(), r"freqs_cos of feat_rope must be \(T, d\) = \(4, 6\), got None"),
        (
            lambda: one_of(Rotary(2, WIDE), "freqs_sin"),
            "freqs_sin of feat_rope must be .* got None",
        ),
        (lambda: Rotary(3, WIDE), r"\(T, d\) = \(4, 6\), got \(9, 6\)"),
        (
            lambda: Skewed(2, WIDE),
            "by its freqs_cos and freqs_sin, got a Skewed whose result differs",
        ),
    ],
)
def test_positions_that_are_not_in_their_table_are_refused(rope, message):
    block, (x, c, _) = lightning()
    holder = nn.ModuleList([block])
    fuse(holder)
    with pytest.raises(ValueError, match=message):
        holder[0](x, c, rope())


def test_the_table_is_made_again_where_positions_change():
    block, (x, c, rope) = lightning()
    holder = nn.ModuleList([block])
    fuse(holder)
    first = holder[0](x, c, rope)
    rope.freqs_cos.copy_(rope.freqs_sin.clone())
    assert not torch.allclose(holder[0](x, c, rope), first)
    torch.testing.assert_close(holder[0](x, c, rope), block(x, c, rope), rtol=1e-4, atol=1e-4)
