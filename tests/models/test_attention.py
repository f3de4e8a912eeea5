import math
from itertools import product

import pytest
import torch
from models.tiny import randomise

from dbkernels.models.attention import Attention, rotary_table, rotate

B, T, D, H = 2, 5, 12, 3  # a head is 4 wide, and no two sizes agree


def turned(x, base=10000.0):
    """Rotary positions as a multiplication of complex numbers; x (B, T, H, d)."""
    half = x.shape[-1] // 2
    frequency = base ** -(torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[1], dtype=torch.float64)[:, None, None] * frequency
    z = torch.complex(x[..., :half], x[..., half:]) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([z.real, z.imag], dim=-1)


def exact(attention, x, rotary):
    """Attention one head at a time, by an explicit softmax."""
    d = D // H
    q, k, v = attention.qkv(x).split(D, dim=-1)
    q, k, v = (part.reshape(B, T, H, d) for part in (q, k, v))
    if isinstance(attention.q_norm, torch.nn.RMSNorm):
        q = q / (q.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.q_norm.weight
        k = k / (k.square().mean(-1, keepdim=True) + 1e-6).sqrt() * attention.k_norm.weight
    if rotary:
        q, k = turned(q), turned(k)
    heads = []
    for head in range(H):
        scores = q[:, :, head] @ k[:, :, head].transpose(1, 2) / math.sqrt(d)
        heads.append((scores.exp() / scores.exp().sum(-1, keepdim=True)) @ v[:, :, head])
    return attention.out(torch.cat(heads, dim=-1))


@pytest.mark.parametrize(("qk_norm", "bias", "rotary"), list(product([False, True], repeat=3)))
def test_agrees_with_an_explicit_softmax(qk_norm, bias, rotary):
    attention = randomise(Attention(D, H, qk_norm=qk_norm, bias=bias), std=0.7).double()
    x = torch.randn(B, T, D, dtype=torch.float64) + 1
    table = rotary_table(torch.arange(T), D // H) if rotary else None
    tolerance = 1e-5 if rotary else 1e-12  # the table is float32
    actual = attention(x, table)
    torch.testing.assert_close(actual, exact(attention, x, rotary), rtol=tolerance, atol=tolerance)


def test_the_options_decide_which_parameters_there_are():
    plain = {"qkv.weight", "qkv.bias", "out.weight", "out.bias"}
    assert set(Attention(D, H).state_dict()) == plain
    assert set(Attention(D, H, bias=False).state_dict()) == {"qkv.weight", "out.weight"}
    normed = Attention(D, H, qk_norm=True).state_dict()
    assert set(normed) == plain | {"q_norm.weight", "k_norm.weight"}
    assert normed["q_norm.weight"].shape == (D // H,)


def test_the_table_holds_cosines_then_sines_each_half_repeated():
    table = rotary_table(torch.tensor([0, 3]), 4, base=100.0)
    angles = torch.tensor([[0, 0, 0, 0], [3, 0.3, 3, 0.3]])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.stack([angles.cos(), angles.sin()]))


def test_scores_depend_on_relative_positions_alone():
    q, k = torch.randn(2, 1, T, 8, dtype=torch.float64)
    positions = torch.arange(T)

    def scores(shift):
        table = rotary_table(positions + shift, 8).double()
        return rotate(q, table) @ rotate(k, table).transpose(-1, -2)

    torch.testing.assert_close(scores(17), scores(0), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores(0), q @ k.transpose(-1, -2), atol=1e-2)


def test_rotation_keeps_the_length_and_the_dtype():
    x = torch.randn(B, H, T, 8)
    table = rotary_table(torch.arange(T), 8)
    torch.testing.assert_close(rotate(x, table).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotate(x, table)[:, :, 0], x[:, :, 0])
    assert rotate(x.bfloat16(), table).dtype == torch.bfloat16


def test_normalised_queries_and_rotation_work_under_autocast():
    attention = randomise(Attention(D, H, qk_norm=True))
    x, table = torch.randn(B, T, D), rotary_table(torch.arange(T), D // H)
    with torch.autocast("cpu", torch.bfloat16):
        half = attention(x, table)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), attention(x, table), rtol=0.05, atol=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Attention(12, 5), "width must be a multiple of the heads, got 12 and 5"),
        (lambda: rotary_table(torch.arange(3), 5), "need an even head width, got 5"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
