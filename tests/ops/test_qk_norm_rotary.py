import pytest
import torch
from implementations import each_implementation
from ops.row_ops import ROW_OPS_BY_NAME

from dbkernels.ops.backend import tile
from dbkernels.ops.qk_norm_rotary import (
    head_launch,
    qk_norm_rotary,
    qk_norm_rotary_backward,
    qk_norm_rotary_forward,
)

implementation = each_implementation("qk_norm_rotary_fwd")
pytestmark = pytest.mark.usefixtures("implementation")


def inputs(*shape):
    """qkv, the weights of both norms and a table that starts at position 3."""
    args, options = ROW_OPS_BY_NAME["qk_norm_rotary"].inputs(shape)
    return *args, options["rotary"]


def test_values_are_left_alone_in_place():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    dqkv = torch.randn_like(qkv)
    expected = dqkv[..., 32:].clone()
    dweights = torch.empty_like(q_weight), torch.empty_like(k_weight)
    qk_norm_rotary_backward(dqkv, qkv, q_weight, k_weight, table, *dweights, 2, 1e-6)
    assert torch.equal(dqkv[..., 32:], expected)


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
        ({"rotary": torch.zeros(2, 5, 8).half()}, "of torch.float32, got .* torch.float16"),
        ({"rotary": torch.zeros(2, 5, 8).requires_grad_()}, "rotary must not require a gradient"),
        ({"rotary": torch.zeros(2, 5, 8, device="meta")}, "must be on one device"),
        ({"qkv": torch.zeros(2, 5, 30)}, "must be even to be rotated, got 5"),
        ({"qkv": torch.zeros(1, 1, 3078), "heads": 1}, "head width must be 1 to 1024, got 1026"),
    ],
)  # fmt: skip
def test_rejects(change, message):
    names = ("qkv", "q_weight", "k_weight", "rotary")
    args = {"heads": 2, **dict(zip(names, inputs(2, 5, 2, 8), strict=True)), **change}
    if change.keys() == {"qkv"} and args["qkv"].shape[-1] == 30:
        args.update(q_weight=None, k_weight=None)
    with pytest.raises(ValueError, match=message):
        qk_norm_rotary(args.pop("qkv"), args.pop("heads"), **args)
