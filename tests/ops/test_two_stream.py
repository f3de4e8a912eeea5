"""What attention of two streams promises beside what all ops over heads do."""

import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from accuracy import assert_op_is_accurate, with_grads
from implementations import each_implementation
from ops.row_ops import DTYPES, TWO_STREAM
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import attention, reference, use_implementation
from dbkernels.ops.backend import tile
from dbkernels.ops.two_stream import two_stream_attention, two_stream_backward, two_stream_forward

implementation = each_implementation("two_stream_fwd")
by_each = pytest.mark.usefixtures("implementation")
# one token; an odd number of them; no multiple of a tile of the flash kernel; and many
SHAPES = [(4, 1, 3, 16), (4, 7, 3, 16), (4, 130, 2, 16), (2, 1024, 1, 8)]


def streams(*shape, dtype=torch.float32):
    return TWO_STREAM.inputs(shape, dtype)[0]


def by_head(*tensors):
    return [x.transpose(1, 2) for x in tensors]


@pytest.mark.parametrize("f", [two_stream_attention, reference.two_stream_attention])
def test_two_tokens_have_the_results_that_one_computes_by_hand(f):
    def both(noisy, clean):
        return torch.tensor([noisy, clean], dtype=torch.float64)[..., None, None]

    q, k = both([1, 1], [1, 1]), both([0, 0], [math.log(2), 0])
    noisy, clean = f(q.cpu(), k.cpu(), both([10, 20], [1, 3]).cpu())
    # shares of 2/3 and 1/3, then 1/2, 1/4 and 1/4
    assert noisy.flatten().tolist() == pytest.approx([4, 25 / 4], abs=1e-12)
    assert clean.flatten().tolist() == pytest.approx([1, 5 / 3], abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_masked_softmax_to_twelve_digits_in_float64(shape):
    args = [x.cpu() for x in streams(*shape, dtype=torch.float64)]
    actual = with_grads(two_stream_attention, *args)
    expected = with_grads(reference.two_stream_attention, *args)
    for value, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(value, exact, rtol=1e-12, atol=1e-12)


@by_each
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_is_as_accurate_as_eager_in_float32(shape):
    args = streams(*shape)
    assert_op_is_accurate(two_stream_attention, reference.two_stream_attention, args)


@by_each
def test_large_products_do_not_overflow():
    q, k, v = streams(2, 5, 2, 8)
    out, *grads = with_grads(two_stream_attention, 1e4 * q, 1e4 * k, v)
    assert all(x.isfinite().all() for x in grads)
    exact = reference.two_stream_attention(1e4 * q.double(), 1e4 * k.double(), v.double())
    torch.testing.assert_close(out, exact, check_dtype=False, rtol=1e-4, atol=1e-4)


def moved_by(f, args, place, sample):
    """Whether f's result at each sample and place is another when one token's k and v are."""
    before, after = f(*args), None
    q, k, v = (x.clone() for x in args)
    k[sample, place] += 1
    v[sample, place] += 1
    after = f(q, k, v)
    return (before != after).flatten(2).any(2)


@by_each
@pytest.mark.parametrize("place", [0, 3, 8])
def test_a_token_moves_those_alone_that_see_it(place):
    noisy, clean, places = 1, 4, torch.arange(9)
    later, nothing = places >= place, torch.zeros(9, dtype=torch.bool)
    args = streams(6, 9, 2, 8)
    none = [nothing] * 6
    moved = moved_by(two_stream_attention, args, place, clean)
    assert torch.equal(moved, torch.stack([*none[:1], later, *none[:2], later, *none[:1]]))
    moved = moved_by(two_stream_attention, args, place, noisy)
    assert torch.equal(moved, torch.stack([*none[:1], places == place, *none[:4]]))
    moved = moved_by(partial(attention, causal=True), args, place, clean)
    assert torch.equal(moved, torch.stack([*none[:4], later, *none[:1]]))


@by_each
@pytest.mark.parametrize("H", [1, 2])
def test_without_the_clean_queries_the_noisy_results_have_the_same_bits(H):
    q, k, v = by_head(*streams(6, 9, H, 8))
    out, logsumexp = two_stream_forward(q, k, v)
    fewer, of_fewer = two_stream_forward(q[:3], k, v)
    assert torch.equal(fewer, out[:3]) and torch.equal(of_fewer, logsumexp[:3])
    dout = torch.randn_like(out)
    dout[3:] = 0
    dq, *dkv = two_stream_backward(dout, q, k, v, out, logsumexp)
    few, *of_few = two_stream_backward(dout[:3], q[:3], k, v, fewer, of_fewer)
    assert torch.equal(few, dq[:3]) and not dq[3:].any()
    assert all(map(torch.equal, of_few, dkv))


class Largest(TorchDispatchMode):
    """The most elements of a tensor."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.elements = max([self.elements, *(t.numel() for t in tensors)])
        return out


def test_nothing_has_a_size_of_all_pairs_of_tokens():
    args = streams(2, 512, 1, 8)
    with Largest() as largest:
        with_grads(two_stream_attention, *args)
    assert largest.elements <= 3 * 2 * 512 * 8
    with Largest() as largest:
        with_grads(reference.two_stream_attention, *args)
    assert largest.elements >= 512**2


def test_keeps_one_out_and_one_logsumexp():
    args = [x.detach().requires_grad_() for x in streams(4, 5, 3, 8)]
    out = two_stream_attention(*args)
    *given, kept, logsumexp = out.grad_fn.next_functions[0][0].saved_tensors
    assert [t.data_ptr() for t in given] == [t.data_ptr() for t in args]
    assert kept.data_ptr() == out.data_ptr()
    assert logsumexp.dtype == torch.float32 and logsumexp.shape[:2] == (4, 3)


# a program has several tiles or one, and the tokens of two samples or of one
@pytest.mark.parametrize(
    ("processors", "shape"), [(1, (10, 5, 3, 64)), (3, (4, 50, 3, 8)), (100, (4, 9, 1, 40))]
)
def test_any_number_of_programs_shares_the_tokens(processors, shape, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: processors)
    with use_implementation("triton"):
        args = streams(*shape)
        assert_op_is_accurate(two_stream_attention, reference.two_stream_attention, args)


# a GPU's kernels cannot run here, but what they are given and return has shapes: meta tensors go
# the way of a GPU's
@pytest.mark.parametrize("fewer", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_shapes_without_data(device, dtype, fewer):
    N = 3 if fewer else 6
    with FakeTensorMode() if device == "cpu" else nullcontext():
        qkv = torch.empty(6, 5, 3, 4, 16, device=device, dtype=dtype)
        q, k, v = by_head(*qkv.unbind(2))
        out, logsumexp = two_stream_forward(q[:N], k, v)
        assert out.shape == (N, 5, 64) and out.is_contiguous()
        # the memory-efficient kernel rounds the tokens up
        rounded = 32 if (device, dtype) == ("meta", torch.float32) else 5
        assert logsumexp.shape == (N, 4, rounded) and logsumexp.is_contiguous()
        dout = torch.empty_like(out)
        grads = two_stream_backward(dout, q[:N], k, v, out, logsumexp)
        for x, like in zip(grads, (q[:N], k, v), strict=True):
            assert (x.shape, x.dtype, x.device) == (like.shape, dtype, like.device)
            assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:3], k[:3], v[:3]), "must have 2B samples, .*, got 3"),
        (lambda q, k, v: (q[0], k[0], v[0]), r"must be \(B, T, H, d\) alike, got \(5, 2, 8\)"),
        (lambda q, k, v: (q[:2], k, v), r"must be \(B, T, H, d\) alike, got \(2, 5, 2, 8\)"),
        (lambda q, k, v: (q, k, v.half()), "must have one dtype, got torch.float32"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        two_stream_attention(*change(*streams(4, 5, 2, 8)))
