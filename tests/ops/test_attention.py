import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import reference
from dbkernels.ops.attention import attention, attention_backward, attention_forward

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, d: one token; fewer tokens than a tile of the kernels; more than one
SHAPES = [(1, 1, 1, 8), (2, 5, 3, 8), (3, 70, 2, 16)]


def inputs(B, T, H, d, dtype=torch.float32):
    """Queries, keys and values as slices of a projection, as the model passes them."""
    # keys and values far from zero mean: a dropped row sum of the backward would show
    qkv = torch.randn(B, T, 3, H, d) + torch.tensor([0.0, 1.0, 3.0])[:, None, None]
    return qkv.to(dtype).unbind(2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype):
    args = inputs(*shape, dtype)
    actual = with_grads(attention, *args)
    eager = with_grads(reference.attention, *args)
    exact = with_grads(reference.attention, *(a.double() for a in args))
    for name, *results in zip(["out", "dq", "dk", "dv"], actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


@pytest.mark.parametrize("d", [1, 5])
def test_any_head_width_on_a_cpu(d):
    args = [x.cpu().double() for x in inputs(2, 5, 3, d)]
    for actual, exact in zip(
        with_grads(attention, *args), with_grads(reference.attention, *args), strict=True
    ):
        torch.testing.assert_close(actual, exact)


def test_gradients_are_those_of_differences():
    args = [x.cpu().double().requires_grad_() for x in inputs(1, 3, 2, 4)]
    torch.autograd.gradcheck(attention, args)
    torch.autograd.gradgradcheck(reference.attention, args)


def test_the_logsumexp_is_of_the_scaled_products():
    q, k, v = (x.transpose(1, 2) for x in inputs(2, 5, 3, 16))
    out, logsumexp = attention_forward(q, k, v)
    expected = (q.double() @ k.double().mT / 4).logsumexp(-1)
    torch.testing.assert_close(logsumexp[..., :5].double(), expected, rtol=1e-5, atol=1e-5)
    assert out.shape == (2, 5, 48) and out.is_contiguous()


class Lengths(TorchDispatchMode):
    """The lengths of queries and keys that torch's flash kernels tell, and are told."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        outputs = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._scaled_dot_product_flash_attention.default:
            self.told = outputs[4:6]
        if func is torch.ops.aten._scaled_dot_product_flash_attention_backward.default:
            self.given = args[8:10]
        return outputs


def test_a_gpus_backward_is_given_the_lengths_of_its_forward():
    q, k, v = (torch.empty(2, n, 3, 8, dtype=torch.bfloat16, device="meta") for n in (4, 9, 9))
    heads = [x.transpose(1, 2) for x in (q, k, v)]
    with Lengths() as lengths:
        out, logsumexp = attention_forward(*heads)
        attention_backward(torch.empty_like(out), *heads, out, logsumexp)
    assert tuple(lengths.given) == tuple(lengths.told) == (4, 9)


def test_the_order_of_the_keys_does_not_matter():
    q, k, v = inputs(2, 9, 2, 8)
    order = torch.randperm(9)
    torch.testing.assert_close(attention(q, k[:, order], v[:, order]), attention(q, k, v))


def test_samples_and_heads_do_not_see_each_other():
    args = inputs(3, 5, 3, 8)
    before = with_grads(attention, *args)
    changed = [x.clone() for x in args]
    for x in changed:
        x[1] += 1
        x[:, :, 1] -= 1
    for a, b in zip(before, with_grads(attention, *changed), strict=True):
        assert torch.equal(a[::2, :, ::2], b[::2, :, ::2])
        assert not torch.equal(a[1], b[1]) and not torch.equal(a[:, :, 1], b[:, :, 1])


def test_large_products_do_not_overflow():
    q, k, v = inputs(2, 5, 2, 8)
    results = with_grads(attention, 1e4 * q, 1e4 * k, v)
    assert all(x.isfinite().all() for x in results)
    exact = reference.attention(1e4 * q.double(), 1e4 * k.double(), v.double())
    torch.testing.assert_close(results[0].double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["dense", "heads first", "columns apart", "shared by samples"])
def test_takes_any_layout(layout):
    args = [x.contiguous() for x in inputs(2, 5, 3, 8)]
    strided = {
        "dense": lambda x: x,
        "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
        "columns apart": lambda x: torch.stack([x, x], dim=-1)[..., 0],
        "shared by samples": lambda x: x[:1].expand_as(x),
    }[layout]
    values = [strided(x).contiguous() for x in args]
    for actual, expected in zip(
        with_grads(attention, *map(strided, args)), with_grads(attention, *values), strict=True
    ):
        assert torch.equal(actual, expected)


def test_takes_any_layout_of_gradient():
    args = [x.detach().requires_grad_() for x in inputs(2, 5, 3, 8)]
    out = attention(*args)
    ones = torch.ones_like(out)
    dense = torch.autograd.grad(out, args, ones, retain_graph=True)
    heads_first = torch.ones(2, 3, 5, 8).transpose(1, 2)
    for dout in (torch.ones(()).expand_as(out), heads_first):
        for a, b in zip(
            torch.autograd.grad(out, args, dout, retain_graph=True), dense, strict=True
        ):
            assert torch.equal(a, b)


def test_keeps_one_out_and_one_logsumexp():
    args = [x.detach().requires_grad_() for x in inputs(2, 5, 3, 8)]
    out = attention(*args)
    *_, kept, logsumexp = out.grad_fn.next_functions[0][0].saved_tensors
    assert kept.data_ptr() == out.data_ptr()
    assert logsumexp.dtype == torch.float32 and logsumexp.shape[:2] == (2, 3)


def test_same_bits_every_run():
    args = inputs(2, 70, 2, 8)
    for a, b in zip(with_grads(attention, *args), with_grads(attention, *args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("shape", [(0, 5, 3, 8), (2, 0, 3, 8)], ids=str)
def test_empty_batch(shape):
    assert all(x.shape == shape for x in with_grads(attention, *inputs(*shape)))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    args = inputs(2, 9, 2, 8)
    compiled = torch.compile(attention, backend=backend, fullgraph=True)
    for a, b in zip(with_grads(compiled, *args), with_grads(attention, *args), strict=True):
        torch.testing.assert_close(a, b)


# a GPU's kernels cannot run here, but what they are given and return has shapes
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_without_data(device, dtype):
    with FakeTensorMode():
        qkv = torch.empty(2, 5, 3, 4, 16, device=device, dtype=dtype)
        q, k, v = (x.transpose(1, 2) for x in qkv.unbind(2))
        out, logsumexp = attention_forward(q, k, v)
        assert out.shape == (2, 5, 64) and out.is_contiguous()
        assert logsumexp.dtype == torch.float32 and logsumexp.device == q.device
        # the memory-efficient kernel rounds the tokens up
        rounded = 32 if (device, dtype) == ("cuda", torch.float32) else 5
        assert logsumexp.shape == (2, 4, rounded)
        for x in attention_backward(torch.empty_like(out), q, k, v, out, logsumexp):
            assert (x.shape, x.dtype, x.device) == (q.shape, dtype, q.device)
            assert x.transpose(1, 2).is_contiguous()


def test_float64_has_a_float64_logsumexp_even_when_empty():
    for B in (0, 2):
        q, k, v = (x.cpu().double().transpose(1, 2) for x in inputs(B, 5, 3, 8))
        assert attention_forward(q, k, v)[1].dtype == torch.float64


def test_refuses_a_second_derivative():
    q, k, v = (x.detach().requires_grad_() for x in inputs(1, 3, 2, 8))
    with pytest.raises(RuntimeError, match="attention has no second derivative"):
        torch.autograd.grad(attention(q, k, v).sum(), q, create_graph=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k[0], v[0]), r"must be \(B, T, H, d\) alike, got \(5, 2, 8\)"),
        (lambda q, k, v: (q, k[:, :4], v), r"alike, got .*\(2, 4, 2, 8\)"),
        (lambda q, k, v: (q, k, v[:1]), r"alike, got .*\(1, 5, 2, 8\)"),
        (lambda q, k, v: (q, k, v.half()), "must have one dtype, got torch.float32"),
        (lambda q, k, v: (q.half(), k, v), "must have one dtype, got torch.float16"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q must be one of"),
        (lambda q, k, v: (q, k.to("meta"), v), "must be on one device"),
    ],
)
def test_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*inputs(2, 5, 2, 8)))


@pytest.mark.parametrize("d", [12, 264])
def test_rejects_heads_that_a_gpu_has_no_kernel_for(d):
    with FakeTensorMode():
        x = torch.empty(1, 2, 2, d, device="cuda", dtype=torch.bfloat16)
        with pytest.raises(ValueError, match=f"multiple of 8 and at most 256, got {d}"):
            attention(x, x, x)
