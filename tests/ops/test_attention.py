"""What attention promises beside what `test_row_ops` goes over."""

import pytest
import torch
from accuracy import with_grads
from ops.row_ops import ATTENTION, DTYPES
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import reference
from dbkernels.ops.attention import attention, attention_backward, attention_forward


def inputs(*shape):
    return ATTENTION.inputs(shape)[0]


@pytest.mark.parametrize("d", [1, 5])
def test_any_head_width_on_a_cpu(d):
    args = [x.cpu().double() for x in inputs(2, 5, 3, d)]
    expected = with_grads(reference.attention, *args)
    torch.testing.assert_close(with_grads(attention, *args), expected)


def test_the_logsumexp_is_of_the_scaled_products():
    q, k, v = (x.transpose(1, 2) for x in inputs(2, 5, 3, 16))
    out, logsumexp = attention_forward(q, k, v)
    expected = (q.double() @ k.double().mT / 4).logsumexp(-1)
    torch.testing.assert_close(logsumexp[..., :5].double(), expected, rtol=1e-5, atol=1e-5)
    assert out.shape == (2, 5, 48) and out.is_contiguous()
    # float64 where those are, even when empty
    for B in (0, 2):
        q, k, v = (x.cpu().double().transpose(1, 2) for x in inputs(B, 5, 3, 8))
        assert attention_forward(q, k, v)[1].dtype == torch.float64


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


def test_large_products_do_not_overflow():
    q, k, v = inputs(2, 5, 2, 8)
    out, *grads = with_grads(attention, 1e4 * q, 1e4 * k, v)
    assert all(x.isfinite().all() for x in grads)
    exact = reference.attention(1e4 * q.double(), 1e4 * k.double(), v.double())
    torch.testing.assert_close(out, exact, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_keeps_one_out_and_one_logsumexp():
    args = [x.detach().requires_grad_() for x in inputs(2, 5, 3, 8)]
    out = attention(*args)
    *_, kept, logsumexp = out.grad_fn.next_functions[0][0].saved_tensors
    assert kept.data_ptr() == out.data_ptr()
    assert logsumexp.dtype == torch.float32 and logsumexp.shape[:2] == (2, 3)


def test_compiles_with_inductor():
    args = inputs(2, 9, 2, 8)
    compiled = torch.compile(attention, backend="inductor", fullgraph=True)
    torch.testing.assert_close(with_grads(compiled, *args), with_grads(attention, *args))


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
