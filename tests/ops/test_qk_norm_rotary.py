import pytest
import torch
from accuracy import with_grads
from implementations import implementations
from ops.row_ops import ROW_OPS_BY_NAME, on_heads, rotary_table

from dbkernels.ops import reference
from dbkernels.ops.backend import tile
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.qk_norm_rotary import (
    head_launch,
    qk_norm_rotary,
    qk_norm_rotary_backward,
    qk_norm_rotary_forward,
)

pytestmark = pytest.mark.usefixtures("ran_by")


@pytest.fixture(params=implementations("qk_norm_rotary_fwd"))
def ran_by(request):
    with use_implementation(request.param):
        yield request.param


def inputs(*shape):
    """qkv, the weights of both norms and a table that starts at position 3."""
    args, options = ROW_OPS_BY_NAME["qk_norm_rotary"].inputs(shape)
    return *args, options["rotary"]


def together(f, heads, **options):
    """f of tensors alone, with q and k in one tensor, for `with_grads`."""
    return lambda *args: torch.stack(on_heads(f)(*args, heads=heads, **options))


@pytest.mark.parametrize("d", [1, 2, 7])
def test_narrow_and_odd_heads_can_be_normalised(d):
    qkv, q_weight, k_weight, _ = inputs(2, 5, 3, 2 * d)
    args = (qkv[..., : 9 * d], q_weight[:d], k_weight[:d])
    actual = with_grads(together(qk_norm_rotary, 3), *args)
    exact = with_grads(together(reference.qk_norm_rotary, 3), *(a.double() for a in args))
    for result, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_single_pair_is_turned_by_its_position():
    qkv = torch.tensor([3.0, 4.0]).repeat(1, 2, 3)
    q, k = qk_norm_rotary(qkv, 1, rotary=rotary_table(torch.tensor([0.0, torch.pi / 2]), 2))
    expected = torch.tensor([[3.0, 4.0], [-4.0, 3.0]]).view(1, 2, 1, 2)
    torch.testing.assert_close(q, expected)
    torch.testing.assert_close(k, expected)


def test_small_heads_feel_eps():
    qkv, q_weight, k_weight, _ = inputs(2, 5, 3, 8)
    args = (1e-3 * qkv, q_weight, k_weight)
    actual = with_grads(together(qk_norm_rotary, 3, eps=1e-4), *args)
    spec = together(reference.qk_norm_rotary, 3, eps=1e-4)
    exact = with_grads(spec, *(a.double() for a in args))
    for result, expected in zip(actual, exact, strict=True):
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def test_weights_may_be_wider_than_the_heads():
    qkv, q_weight, k_weight, table = inputs(2, 5, 3, 8)
    args = (qkv.bfloat16(), q_weight, k_weight)
    actual = with_grads(together(qk_norm_rotary, 3, rotary=table), *args)
    spec = together(reference.qk_norm_rotary, 3, rotary=table)
    assert [a.dtype for a in actual[2:]] == [torch.float32] * 2
    for result, expected in zip(
        actual[2:], with_grads(spec, *map(torch.Tensor.double, args))[2:], strict=True
    ):
        torch.testing.assert_close(result.double(), expected, rtol=1e-2, atol=1e-1)


def test_a_rotation_keeps_the_norm():
    qkv, _, _, table = inputs(2, 9, 2, 8)
    q, k = qk_norm_rotary(qkv, 2, rotary=table)
    before = qkv.unflatten(-1, (3, 2, 8)).norm(dim=-1)
    torch.testing.assert_close(torch.stack([q.norm(dim=-1), k.norm(dim=-1)], 2), before[:, :, :2])


def test_products_see_relative_positions_only():
    qkv, q_weight, k_weight, _ = inputs(1, 9, 2, 8)
    products = []
    for start in (0, 40):
        table = rotary_table(start + torch.arange(9), 8)
        q, k = qk_norm_rotary(qkv, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
        products.append(torch.einsum("bthd,bshd->bhts", q, k))
    torch.testing.assert_close(*products, rtol=1e-4, atol=1e-4)


def test_a_norm_ignores_the_scale_of_a_head():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    weights = {"q_weight": q_weight, "k_weight": k_weight, "rotary": table}
    for large, small in zip(
        qk_norm_rotary(50 * qkv, 2, **weights), qk_norm_rotary(qkv, 2, **weights), strict=True
    ):
        torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-4)


def test_values_have_no_gradient_and_are_left_alone_in_place():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=table)
    assert not with_grads(f, qkv, q_weight, k_weight)[1][..., 32:].any()

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


def test_a_gradient_of_keys_alone():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    x = qkv.clone().requires_grad_()
    _, k = qk_norm_rotary(x, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    (grad,) = torch.autograd.grad(k.sum(), x)
    assert not grad[..., :16].any() and grad[..., 16:32].all()


@pytest.mark.parametrize("ran_by", ["torch"], indirect=True)
def test_compiles_with_inductor():
    *args, table = inputs(2, 9, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=table)
    compiled = torch.compile(f, backend="inductor", fullgraph=True)
    assert all(map(torch.equal, with_grads(compiled, *args), with_grads(f, *args)))


def test_allocates_queries_and_keys_only():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    qk = qk_norm_rotary_forward(qkv, (q_weight, k_weight), table, 2, 1e-6)
    assert qk.shape == (2, 5, 2, 2, 8) and qk.is_contiguous()
    q, k = qk_norm_rotary(qkv, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    assert torch.equal(torch.stack([q, k], 2), qk)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


@pytest.mark.parametrize("d", [1, 2, 7, 32, 64, 72, 96, 128, 256, 1024])
def test_a_tile_gives_every_thread_eight_lanes_of_each_half(d):
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
