"""Attention to another sequence, of each sample the first so many keys."""

from contextlib import nullcontext

import pytest
import torch
from accuracy import assert_op_is_accurate, with_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import cross_attention, reference_layers

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# one query; a key fewer than a row of the bias is padded to, and one more; many of both
SHAPES = [(3, 1, 5, 3, 8), (4, 7, 15, 2, 16), (4, 9, 17, 3, 8), (3, 130, 70, 2, 16)]


def inputs(B, N, S, H, d, dtype=F32):
    """q, k and v as slices of wider tensors, and ragged lengths with 0 among them."""
    torch.manual_seed(B + N)
    q = torch.randn(B, N, 2, H, d, dtype=F64).to(dtype)[:, :, 0]
    k, v = (torch.randn(B, S, 2, H, d, dtype=F64) + 0.5).to(dtype).unbind(2)
    return (q, k, v), torch.tensor([S, 0, min(S, 1), S // 2][:B])


def ours(lengths):
    return lambda *given: cross_attention(*given, lengths=lengths)


def specified(lengths):
    return lambda *given: reference_layers.cross_attention(*given, lengths=lengths)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_masked_softmax_to_twelve_digits_in_float64(shape, masked):
    args, lengths = inputs(*shape, dtype=F64)
    lengths = lengths if masked else None
    actual, exact = (with_grads(f(lengths), *args) for f in (ours, specified))
    for value, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", SHAPES[2:], ids=str)
def test_is_as_accurate_as_eager(shape, masked, dtype):
    args, lengths = inputs(*shape, dtype=dtype)
    lengths = lengths if masked else None
    assert_op_is_accurate(ours(lengths), specified(lengths), args)


def test_a_sample_without_keys_has_zeros_and_no_gradient():
    args, _ = inputs(3, 5, 6, 2, 8)
    out, *grads = with_grads(ours(torch.tensor([0, 6, 0])), *args)
    for t in (out, *grads):
        assert t.isfinite().all() and not t[0].any() and not t[2].any() and t[1].any()
    args, _ = inputs(3, 5, 0, 2, 8)
    for lengths in (None, torch.tensor([0, 0, 0])):
        for t, like in zip(with_grads(ours(lengths), *args), (args[0], *args), strict=True):
            assert t.shape == like.shape and not t.any()


def test_what_is_past_a_length_changes_nothing_and_has_no_gradient():
    (q, k, v), lengths = inputs(4, 5, 9, 2, 8)
    expected = with_grads(ours(lengths), q, k, v)
    past = (torch.arange(9) >= lengths[:, None])[..., None, None]
    k, v = (torch.where(past, 1e4 * torch.randn_like(t), t) for t in (k, v))
    actual = with_grads(ours(lengths), q, k, v)
    assert all(map(torch.equal, actual, expected))
    assert all(not (t * past).any() for t in actual[2:])


def test_lengths_of_all_keys_are_no_lengths():
    args, _ = inputs(3, 5, 9, 2, 8, dtype=F64)
    whole, none = (with_grads(ours(t), *args) for t in (torch.full((3,), 9), None))
    for value, expected in zip(whole, none, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-13, atol=1e-13)


class Largest(TorchDispatchMode):
    """The most bytes that a tensor of an op really has."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_nothing_of_all_pairs_exists():
    (q, k, v), _ = inputs(1, 512, 512, 1, 8)
    with Largest() as seen:
        with_grads(ours(torch.tensor([300])), q, k, v)
    assert seen.bytes < 512 * 512 * 4 / 8


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_has_shapes_without_numbers(device):
    args, lengths = inputs(3, 5, 6, 2, 8)
    fake = device == "cpu"
    with FakeTensorMode() if fake else nullcontext() as mode:
        *args, lengths = (mode.from_tensor(t) if fake else t.to(device) for t in (*args, lengths))
        results = with_grads(ours(lengths), *args)
    assert [t.shape for t in results] == [t.shape for t in (args[0], *args)]


def test_refuses_a_second_derivative():
    q, k, v = (t.detach().requires_grad_() for t in inputs(3, 5, 6, 2, 8)[0])
    out = cross_attention(q, k, v).sum()
    with pytest.raises(RuntimeError, match="cross_attention has no second derivative"):
        torch.autograd.grad(out, q, create_graph=True)


Q, K = torch.zeros(3, 5, 2, 8), torch.zeros(3, 6, 2, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cross_attention(Q[0], K, K), r"q must be \(B, N, H, d\) and k and v .*, got"),
        (lambda: cross_attention(Q, K, K[:, :5]), r"\(3, 6, 2, 8\) and \(3, 5, 2, 8\)"),
        (lambda: cross_attention(Q, K[:2], K[:2]), r"got \(3, 5, 2, 8\), \(2, 6, 2, 8\)"),
        (lambda: cross_attention(Q, K[..., :4], K[..., :4]), r"\(3, 6, 2, 4\)"),
        (lambda: cross_attention(Q, K.half(), K.half()), "must have one dtype, got"),
        (
            lambda: cross_attention(Q.int(), K.int(), K.int()),
            "q must be one of .*, got torch.int32",
        ),
        (lambda: cross_attention(Q, K, K.to("meta")), "must be on one device, got cpu, meta"),
        (
            lambda: cross_attention(Q, K, K, lengths=torch.ones(3, 6) > 0),
            r"lengths must be \(B,\) = \(3,\) integers, .* no other mask is taken, got \(3, 6\)",
        ),
        (lambda: cross_attention(Q, K, K, lengths=torch.zeros(3)), r"got \(3,\) of torch.float32"),
        (lambda: cross_attention(Q, K, K, lengths=torch.zeros(2).int()), r"got \(2,\)"),
        (
            lambda: cross_attention(Q, K, K, lengths=torch.tensor([0, 7, 6])),
            "lengths must be from 0 to S = 6, got 0 to 7",
        ),
        (
            lambda: cross_attention(Q, K, K, lengths=torch.tensor([-1, 6, 6])),
            "lengths must be from 0 to S = 6, got -1 to 6",
        ),
    ],
    ids=range(12),
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
