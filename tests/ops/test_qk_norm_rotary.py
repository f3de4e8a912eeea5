import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from implementations import implementations

from dbkernels.ops import reference
from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.qk_norm_rotary import (
    _backward_op,
    _forward_op,
    qk_norm_rotary,
    qk_norm_rotary_backward,
    qk_norm_rotary_forward,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, H, d: one token; halves of 3, 5 and 20 leave idle lanes; the last has several tiles to a
# program, and the tokens of its programs do not end with a tile or with a sample
SHAPES = [(2, 1, 4, 10), (2, 5, 3, 6), (3, 11, 3, 8), (2, 33, 5, 40)]

pytestmark = pytest.mark.usefixtures("ran_by")


@pytest.fixture(params=implementations("qk_norm_rotary_fwd"))
def ran_by(request):
    with use_implementation(request.param):
        yield request.param


def rotary_table(positions, d):
    angle = positions[:, None] * 100.0 ** -torch.linspace(0, 1, d // 2 + 1)[:-1]
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2)


def inputs(B, T, H, d, dtype=torch.float32, offset=0.0):
    """qkv, the weights of both norms and a table that starts at position 3."""
    qkv = (offset + torch.randn(B, T, 3 * H * d)).to(dtype)
    # far from 1 and unlike each other, so that no weight can stand in for another
    q_weight, k_weight = (1.5 + torch.randn(d)).to(dtype), (0.5 * torch.randn(d) - 1).to(dtype)
    return qkv, q_weight, k_weight, rotary_table(3 + torch.arange(T), d)


def together(f, heads, **options):
    """f of tensors alone, with q and k in one tensor, for `with_grads`.

    q before k, so that the upstream gradient of each has one sign: sums that cancel would have no
    digits left to compare.
    """

    def both(qkv, *weights):
        names = dict(zip(("q_weight", "k_weight"), weights, strict=False))
        return torch.stack(f(qkv, heads, **names, **options))

    return both


def assert_accurate(heads, rotary, *args):
    actual = with_grads(together(qk_norm_rotary, heads, rotary=rotary), *args)
    spec = together(reference.qk_norm_rotary, heads, rotary=rotary)
    eager = with_grads(spec, *args)
    exact = with_grads(spec, *(a.double() for a in args))
    names = ["qk", "dqkv", "dq_weight", "dk_weight"][: len(actual)]
    for name, *results in zip(names, actual, eager, exact, strict=True):
        assert_as_accurate_as_eager(name, *results)


# offset 30 gives heads whose rms is far from their spread
@pytest.mark.parametrize("offset", [0.0, 30.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype, offset):
    *args, table = inputs(*shape, dtype, offset)
    assert_accurate(shape[2], table, *args)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_either_step_may_be_left_out(dtype):
    *args, table = inputs(2, 5, 3, 6, dtype)
    assert_accurate(3, None, *args)
    assert_accurate(3, table, args[0])


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
    qk_norm_rotary_backward(
        dqkv, qkv, 2, q_weight, k_weight, table, 1e-6,
        dq_weight=torch.empty_like(q_weight), dk_weight=torch.empty_like(k_weight),
    )  # fmt: skip
    assert torch.equal(dqkv[..., 32:], expected)


def test_a_rotation_needs_no_saved_input():
    qkv, _, _, table = inputs(2, 5, 2, 8)
    x = qkv.clone().requires_grad_()
    q, k = qk_norm_rotary(x, 2, rotary=table)
    (expected,) = torch.autograd.grad(q.sum() + k.sum(), x, retain_graph=True)
    dqkv = torch.ones_like(qkv)
    qk_norm_rotary_backward(dqkv, None, 2, None, None, table, 1e-6, dq_weight=None, dk_weight=None)
    assert torch.equal(dqkv[..., :32], expected[..., :32])
    kept = q.grad_fn.next_functions[0][0].saved_tensors
    assert [None if x is None else x.shape for x in kept] == [None, None, None, table.shape]


def test_samples_do_not_see_each_other():
    qkv, q_weight, k_weight, table = inputs(3, 5, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=table)
    y, dqkv, *_ = with_grads(f, qkv, q_weight, k_weight)
    changed = qkv.clone()
    changed[1] += 1
    y_changed, dqkv_changed, *_ = with_grads(f, changed, q_weight, k_weight)
    for a, b in ((y, y_changed), (dqkv[None], dqkv_changed[None])):
        assert torch.equal(a[:, ::2], b[:, ::2]) and not torch.equal(a[:, 1], b[:, 1])


def test_takes_any_layout_of_input_and_gradient():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=table)
    expected = with_grads(f, qkv, q_weight, k_weight)
    wide = torch.stack([qkv, qkv], dim=-1)[..., 0]
    for a, b in zip(with_grads(f, wide, q_weight, k_weight), expected, strict=True):
        assert torch.equal(a, b)

    x = qkv.clone().requires_grad_()
    y = qk_norm_rotary(x, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    ones = torch.ones_like(y[0])
    heads_first = torch.ones(2, 2, 5, 8).transpose(1, 2)
    for dy in (torch.ones(1, 1, 1, 1).expand_as(ones), heads_first):
        (grad,) = torch.autograd.grad(y, x, (dy, dy), retain_graph=True)
        (dense,) = torch.autograd.grad(y, x, (ones, ones), retain_graph=True)
        assert torch.equal(grad, dense)


def test_a_gradient_of_keys_alone():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    x = qkv.clone().requires_grad_()
    _, k = qk_norm_rotary(x, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    (grad,) = torch.autograd.grad(k.sum(), x)
    assert not grad[..., :16].any() and grad[..., 16:32].all()


def test_same_bits_every_run():
    args = inputs(3, 11, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=args[3])
    for first, second in zip(with_grads(f, *args[:3]), with_grads(f, *args[:3]), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("shape", [(0, 5, 2, 4), (2, 0, 2, 4)], ids=str)
def test_empty_batch(shape):
    *args, table = inputs(*shape)
    qk, dqkv, *dweights = with_grads(together(qk_norm_rotary, 2, rotary=table), *args)
    assert qk.shape == (2, *shape) and dqkv.shape == (*shape[:2], 24)
    assert all(torch.equal(dweight, torch.zeros(4)) for dweight in dweights)


def test_gradients_are_those_of_differences(ran_by):
    if ran_by != "torch":
        return
    *args, table = inputs(1, 3, 2, 4)
    args = [a.double().requires_grad_() for a in args]
    torch.autograd.gradcheck(together(qk_norm_rotary, 2, rotary=table), args)


def test_is_a_well_formed_torch_op():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    qk = torch.empty(2, 5, 2, 2, 8)
    torch.library.opcheck(_forward_op, (qkv, q_weight, k_weight, table, qk, 2, 1e-6))
    torch.library.opcheck(_forward_op, (qkv, None, None, table, qk, 2, 1e-6))
    sums = torch.empty_like(q_weight), torch.empty_like(k_weight)
    dqkv = torch.randn_like(qkv)
    torch.library.opcheck(_backward_op, (dqkv, qkv, q_weight, k_weight, table, *sums, 2, 1e-6))
    torch.library.opcheck(_backward_op, (dqkv, None, None, None, table, None, None, 2, 1e-6))


@pytest.mark.parametrize(
    ("ran_by", "backend"),
    [("triton", "aot_eager"), ("torch", "aot_eager"), ("torch", "inductor")],
    indirect=["ran_by"],
)
def test_compiles_without_graph_breaks(backend):
    *args, table = inputs(2, 9, 2, 8)
    f = together(qk_norm_rotary, 2, rotary=table)
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    for actual, expected in zip(with_grads(compiled, *args), with_grads(f, *args), strict=True):
        assert torch.equal(actual, expected)


def test_allocates_queries_and_keys_only():
    qkv, q_weight, k_weight, table = inputs(2, 5, 2, 8)
    qk = qk_norm_rotary_forward(qkv, 2, q_weight, k_weight, table, 1e-6)
    assert qk.shape == (2, 5, 2, 2, 8) and qk.is_contiguous()
    q, k = qk_norm_rotary(qkv, 2, q_weight=q_weight, k_weight=k_weight, rotary=table)
    assert torch.equal(torch.stack([q, k], 2), qk)
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_refuses_a_second_derivative():
    qkv, _, _, table = inputs(1, 3, 2, 4)
    q, _ = qk_norm_rotary(qkv.requires_grad_(), 2, rotary=table)
    with pytest.raises(RuntimeError, match="qk_norm_rotary has no second derivative"):
        torch.autograd.grad(q.sum(), qkv, create_graph=True)


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
