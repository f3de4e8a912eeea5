"""What attention, and norm and rotation of its heads, promise beside what all ops over rows do."""

import pytest
import torch
from accuracy import with_grads
from implementations import each_implementation
from ops.row_ops import ATTENTION, DTYPES, ROW_OPS_BY_NAME
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import LayerWeights, adaln_layer, reference
from dbkernels.ops.attention import attention, attention_backward, attention_forward
from dbkernels.ops.backend import tile
from dbkernels.ops.qk_norm_rotary import (
    head_launch,
    qk_norm_rotary,
    qk_norm_rotary_backward,
    qk_norm_rotary_forward,
)


def qkv_of(*shape):
    return ATTENTION.inputs(shape)[0]


@pytest.mark.parametrize("d", [1, 5])
def test_any_head_width_on_a_cpu(d):
    args = [x.cpu().double() for x in qkv_of(2, 5, 3, d)]
    expected = with_grads(reference.attention, *args)
    torch.testing.assert_close(with_grads(attention, *args), expected)


def test_the_logsumexp_is_of_the_scaled_products():
    q, k, v = (x.transpose(1, 2) for x in qkv_of(2, 5, 3, 16))
    out, logsumexp = attention_forward(q, k, v)
    expected = (q.double() @ k.double().mT / 4).logsumexp(-1)
    torch.testing.assert_close(logsumexp[..., :5].double(), expected, rtol=1e-5, atol=1e-5)
    assert out.shape == (2, 5, 48) and out.is_contiguous()
    # float64 where those are, even when empty
    for B in (0, 2):
        q, k, v = (x.cpu().double().transpose(1, 2) for x in qkv_of(B, 5, 3, 8))
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
    q, k, v = qkv_of(2, 5, 2, 8)
    out, *grads = with_grads(attention, 1e4 * q, 1e4 * k, v)
    assert all(x.isfinite().all() for x in grads)
    exact = reference.attention(1e4 * q.double(), 1e4 * k.double(), v.double())
    torch.testing.assert_close(out, exact, check_dtype=False, rtol=1e-4, atol=1e-4)


def test_keeps_one_out_and_one_logsumexp():
    args = [x.detach().requires_grad_() for x in qkv_of(2, 5, 3, 8)]
    out = attention(*args)
    *_, kept, logsumexp = out.grad_fn.next_functions[0][0].saved_tensors
    assert kept.data_ptr() == out.data_ptr()
    assert logsumexp.dtype == torch.float32 and logsumexp.shape[:2] == (2, 3)


def test_compiles_with_inductor():
    args = qkv_of(2, 9, 2, 8)
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
def test_attention_rejects(change, message):
    with pytest.raises(ValueError, match=message):
        attention(*change(*qkv_of(2, 5, 2, 8)))


def layer_of_one_head(x):
    *_, d = x.shape
    weights = LayerWeights(torch.empty(3 * d, d), None, *(torch.empty(d, d), None) * 3)
    return adaln_layer(torch.empty(1, 2, d), torch.empty(1, 6 * d), weights, num_heads=1)


@pytest.mark.parametrize("f", [lambda x: attention(x, x, x), layer_of_one_head])
@pytest.mark.parametrize("d", [12, 264])
def test_rejects_heads_that_a_gpu_has_no_kernel_for(d, f):
    message = f"on a GPU the head width must be a multiple of 8 and at most 256, got {d}"
    with FakeTensorMode(), torch.device("cuda"), pytest.raises(ValueError, match=message):
        f(torch.empty(1, 2, 1, d))


implementation = each_implementation("qk_norm_rotary_fwd")
by_each = pytest.mark.usefixtures("implementation")


def inputs(*shape):
    """qkv, the weights of both norms and a table that starts at position 3."""
    args, options = ROW_OPS_BY_NAME["qk_norm_rotary"].inputs(shape)
    return *args, options["rotary"]


@by_each
def test_values_are_left_alone_in_place():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    dqkv = torch.randn_like(qkv)
    expected = dqkv[..., 32:].clone()
    dweights = torch.empty_like(q_weight), torch.empty_like(k_weight)
    qk_norm_rotary_backward(dqkv, qkv, q_weight, k_weight, table, *dweights, 2, 1e-6)
    assert torch.equal(dqkv[..., 32:], expected)


@by_each
def test_a_rotation_needs_no_saved_input():
    qkv, _, _, table = inputs(2, 5, 2, 8)
    x = qkv.clone().requires_grad_()
    q, k = qk_norm_rotary(x, 2, rotary=table)
    (expected,) = torch.autograd.grad(q.sum() + k.sum(), x, retain_graph=True)
    dqkv = torch.ones_like(qkv)
    qk_norm_rotary_backward(dqkv, None, None, None, table, None, None, 2, 1e-6)
    assert torch.equal(dqkv[..., :32], expected[..., :32])
    kept = q.grad_fn.next_functions[0][0].saved_tensors
    assert [None if x is None else x.shape for x in kept] == [None, None, None, table.shape]


@by_each
def test_allocates_queries_and_keys_only():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    qk = qk_norm_rotary_forward(qkv, (q_weight, k_weight), table, 2, 1e-6)
    assert qk.shape == (2, 5, 2, 2, 8) and qk.is_contiguous()
    q, k = qk_norm_rotary(qkv, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    assert torch.equal(torch.stack([q, k], 2), qk)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_a_tile_gives_every_thread_eight_lanes_of_each_half():
    for d in (1, 2, 7, 32, 64, 72, 96, 128, 256, 1024):
        *_, options = head_launch(torch.empty(1, 1, 3 * d), 1, 64)
        half = (d + 1) // 2
        assert half <= options["BLOCK_D"] < 2 * half
        assert 32 * 8 * options["num_warps"] == options["BLOCK_T"] * options["BLOCK_D"]


@pytest.mark.parametrize("registers", [64, 128])
@pytest.mark.parametrize(("B", "T"), [(1, 1), (3, 50), (2, 1000)])
def test_one_wave_of_programs_shares_all_tokens(B, T, registers, monkeypatch):
    monkeypatch.setattr(tile, "processors", lambda device: 3)
    programs, each, options = head_launch(torch.empty(B, T, 3 * 2 * 8), 2, registers)
    assert options["HEAD_DIM"] == 8 and options["maxnreg"] == registers
    assert 0 <= programs * each - B * T < each
    # of queries and of keys
    assert 2 * programs <= 3 * 65536 // (128 * registers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 5)}, r"qkv must be \(B, T, 3 D\) with D a multiple of heads"),
        ({"qkv": torch.zeros(2, 5, 46)}, "qkv must be .* 46.* and 2 heads"),
        ({"heads": 0}, "qkv must be .* and 0 heads"),
        ({"k_weight": None}, "must be given together"),
        ({"q_weight": None, "k_weight": None, "rotary": None}, "there is no work"),
        ({"q_weight": torch.zeros(4)}, r"q_weight must be \(d,\) = \(8,\), got \(4,\)"),
        ({"k_weight": torch.zeros(1, 8)}, r"k_weight must be \(d,\) = \(8,\), got \(1, 8\)"),
        ({"k_weight": torch.zeros(8, dtype=torch.int32)}, "k_weight must be one of"),
        ({"rotary": torch.zeros(2, 4, 8)}, r"rotary must be \(2, T, d\) = \(2, 5, 8\)"),
        ({"rotary": torch.zeros(2, 5, 8).half()}, "rotary must be of torch.float32, got .*16"),
        ({"rotary": torch.zeros(2, 5, 8).requires_grad_()}, "rotary must not require a gradient"),
        ({"rotary": torch.zeros(2, 5, 8, device="meta")}, "must be on one device"),
        ({"qkv": torch.zeros(2, 5, 30)}, "must be even to be rotated, got 5"),
        ({"qkv": torch.zeros(1, 1, 3078), "heads": 1}, "head width must be 1 to 1024, got 1026"),
    ],
)  # fmt: skip
def test_qk_norm_rotary_rejects(change, message):
    names = ("qkv", "q_weight", "k_weight", "rotary")
    args = {"heads": 2, **dict(zip(names, inputs(2, 5, 2, 8), strict=True)), **change}
    if change.keys() == {"qkv"} and args["qkv"].shape[-1] == 30:
        args.update(q_weight=None, k_weight=None)
    with pytest.raises(ValueError, match=message):
        qk_norm_rotary(args.pop("qkv"), args.pop("heads"), **args)
