import pytest
import torch
from ops.one_layer import OneLayer

from dbkernels.ops.layer.projection import QKV, Gradients

B, T, D, H = 2, 5, 24, 3
F64 = torch.float64
TOKENS = [None, 1, 3]
WANTED = ("qkv_weight", "qkv_bias")


def weights(dtype=F64, **options):
    return OneLayer(B, T, D, H, dtypes=(dtype,) * 3, **options).weights


def whole_and_some(tokens):
    """(B, T, 3 D), and the same with the queries of some tokens alone."""
    whole = torch.randn(B, T, 3 * D, dtype=F64)
    if tokens is None:
        return whole, QKV(None, whole)
    return whole, QKV(whole[:, :tokens, :D].contiguous(), whole[..., D:].contiguous())


@pytest.mark.parametrize("tokens", TOKENS)
def test_heads_are_views_in_the_order_queries_keys_values(tokens):
    whole, some = whole_and_some(tokens)
    expected = [t.unflatten(-1, (H, -1)).transpose(1, 2) for t in whole.split(D, dim=-1)]
    expected[0] = expected[0][:, :, :tokens]
    for head, values in zip(some.by_head(H), expected, strict=True):
        assert torch.equal(head, values)
        head.zero_()
    assert not any(t.any() for t in some if t is not None)


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_whole_has_zeros_where_there_are_no_queries(tokens):
    whole, some = whole_and_some(tokens)
    if tokens is not None:
        whole[:, tokens:, :D] = 0
    assert torch.equal(some.whole(), whole)


@pytest.mark.parametrize("tokens", TOKENS)
def test_gradients_by_head_are_written_side_by_side(tokens):
    _, some = whole_and_some(tokens)
    parts = [torch.randn(B, t.shape[2], H, D // H, dtype=F64) for t in some.by_head(H)]
    some.write(*(part.transpose(1, 2) for part in parts))
    for head, part in zip(some.by_head(H), parts, strict=True):
        assert torch.equal(head, part.transpose(1, 2))


@pytest.mark.parametrize("tokens", TOKENS)
def test_takes_what_was_done_to_the_whole(tokens):
    _, some = whole_and_some(tokens)
    before = some.whole().clone()
    whole = some.whole()
    whole += 1
    some.take(whole)
    q, k, v = (t.transpose(1, 2).flatten(2) for t in some.by_head(H))
    torch.testing.assert_close(q, before[:, :tokens, :D] + 1)
    torch.testing.assert_close(torch.cat([k, v], dim=-1), before[..., D:] + 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", TOKENS)
def test_projects_as_autograd_does(tokens, bias):
    w = weights(bias=bias)
    y = torch.randn(B, T, D, dtype=F64).requires_grad_()
    leaves = {name: getattr(w, name) for name in WANTED if getattr(w, name) is not None}
    leaves = {name: t.requires_grad_() for name, t in leaves.items()}
    expected = torch.nn.functional.linear(y, w.qkv_weight, w.qkv_bias)
    _, dqkv = whole_and_some(tokens)
    grads = torch.autograd.grad(expected, [y, *leaves.values()], dqkv.whole())
    with torch.no_grad():
        qkv, gradients = QKV.of(y, w, tokens), Gradients(frozenset(leaves), F64)
        dqkv.add_to(gradients, y)
        dy = dqkv.backward(w)
    if tokens is not None:
        expected[:, tokens:, :D] = 0
        assert qkv.q.shape == (B, tokens, D) and qkv.qkv.shape == (B, T, 2 * D)
    torch.testing.assert_close(qkv.whole(), expected)
    torch.testing.assert_close(dy, grads[0])
    assert gradients.sums.keys() == leaves.keys()
    for name, grad in zip(leaves, grads[1:], strict=True):
        torch.testing.assert_close(gradients.sums[name], grad)


@pytest.mark.parametrize("wanted", [(), *[(name,) for name in WANTED]], ids=str)
@pytest.mark.parametrize("tokens", [None, 2])
def test_only_what_is_wanted_is_summed(tokens, wanted):
    gradients = Gradients(frozenset(wanted), F64)
    whole_and_some(tokens)[1].add_to(gradients, torch.randn(B, T, D, dtype=F64))
    assert gradients.sums.keys() == set(wanted)


def test_parts_are_not_rounded_before_they_add_up():
    dqkv = QKV(*(t.bfloat16() for t in whole_and_some(2)[1]))
    y = torch.randn(B, T, D).bfloat16()
    gradients = Gradients(frozenset(["qkv_weight"]), torch.float32)
    expected = torch.zeros(3 * D, D, dtype=F64)
    for _ in range(2):
        dqkv.add_to(gradients, y)
        expected += dqkv.whole().double().flatten(0, 1).T @ y.double().flatten(0, 1)
    assert gradients.sums["qkv_weight"].dtype == torch.float32
    torch.testing.assert_close(gradients.sums["qkv_weight"], expected.float())
