"""One head and its tokens, small enough for the interpreter: the loss and its gradients."""

import importlib
import math
from functools import partial
from itertools import cycle, product

import pytest
import torch
import torch.nn.functional as F
from accuracy import with_grads
from ops.logits import IGNORED, assert_gradient_accurate, assert_loss_accurate, logits, loss, run
from ops.one_layer import Ops
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls

from dbkernels.ops import activations, linear_cross_entropy, reference
from dbkernels.ops.backend.register import use_implementation

# by its name as a module, which the function of the same name hides
module = importlib.import_module("dbkernels.ops.linear_cross_entropy")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
LEADING, V, D = (2, 9), 70, 12
# of what no implementation has for itself
BY_ONE = pytest.mark.parametrize("implementation", ["torch"], indirect=True)
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


@pytest.fixture(params=["triton", "torch"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", 8)  # tokens: three chunks, the last of two tokens
    monkeypatch.setattr(module, "MAX_BLOCK", 64)  # columns: two tiles
    with use_implementation(request.param):
        yield request.param


def inputs(leading=LEADING, dtype=torch.float32):
    """x far from zero, as its mean reaches every row of the weight's gradient; weight and bias."""
    x, weight = 2 + torch.randn(*leading, D), torch.randn(V, D) / 3
    return [t.to(dtype) for t in (x, weight, torch.randn(V))]


def leaves(dtype=torch.float32):
    return [t.requires_grad_() for t in inputs(dtype=dtype)]


def targets(leading=LEADING):
    """Targets of which two are ignored, and weights."""
    target, token_weight = torch.randint(0, V, leading), 0.5 + torch.rand(leading)
    target.view(-1)[1::10] = -100
    return target, token_weight


def assert_same_bits(actual, expected):
    assert all(map(torch.equal, actual, expected))


# every dtype with every reduction, by turns of any leading shape, with a bias and weights or not
SHAPES = LEADING, (), (1,), (16,), (2, 3, 4)
CASES = [*zip(product(DTYPES, REDUCTIONS), cycle(SHAPES), cycle([3, 2]))]


@pytest.mark.parametrize(("case", "leading", "given"), CASES, ids=str)
def test_as_accurate_as_eager(case, leading, given):
    (dtype, reduction), (target, *weights) = case, targets(leading)
    args = inputs(leading, dtype)[:given]
    assert_loss_accurate(args, target, *weights[: given - 2], reduction=reduction)


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1::-1], DTYPES[1:]], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_x_weight_and_bias_may_have_dtypes_of_their_own(dtypes, reduction, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)
    args = [t.to(dtype) for t, dtype in zip(inputs(), [*dtypes, dtypes[0]], strict=True)]
    assert_loss_accurate(args, *targets(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_many_small_parts_in_bfloat16_are_not_lost(reduction, monkeypatch):
    monkeypatch.setattr(module, "tokens_per_chunk", lambda *sizes: 1)
    # one token of 256 and many of 1/2, each half a unit in the last place of the first
    x = torch.full((65, 1), 0.5).index_fill(0, torch.tensor(0), 256).bfloat16()
    parameters = [torch.zeros(*shape).bfloat16().requires_grad_() for shape in ((2, 1), (2,))]
    total = loss(torch.zeros(65).long(), reduction=reduction)(x, *parameters).sum()
    dweight, dbias = torch.autograd.grad(total, parameters)
    assert dweight.view(-1).tolist() == [-144, 144] and dbias.tolist() == [-32.5, 32.5]


def test_a_chunk_depends_on_sizes_alone(monkeypatch):
    monkeypatch.undo()
    chunks = {
        (16384, 50257, 768): 1024,
        (10**6, 50257, 768): 15360,  # as large as x
        (10**6, 50257, 64): 4096,
        (2048, 5003, 64): 128,
        (2047, 16, 768): 98304,
        (0, 5, 3): 128,
    }
    assert {shape: module.tokens_per_chunk(*shape) for shape in chunks} == chunks


def test_the_mean_rounds_the_gradient_of_x_no_more_often_than_eager():
    args, (target, _) = inputs(dtype=torch.bfloat16), targets()
    target[0, :3] = -100  # 14 tokens count, so a division by them would round once more
    dx = with_grads(loss(target), *args)[1]
    eager = with_grads(loss(target, f=reference.linear_cross_entropy), *args)[1]
    assert (dx == eager).float().mean() > 0.95


@each_reduction
def test_an_ignored_token_has_no_part_in_anything(reduction):
    (x, weight, bias), (target, token_weight) = inputs(), targets()
    expected = with_grads(loss(target, token_weight, reduction=reduction), x, weight, bias)
    changed, weights = x.clone(), token_weight.clone()
    changed.view(-1, D)[[1, 11]] = 3.0
    weights.view(-1)[[1, 11]] = torch.nan
    actual = with_grads(loss(target, weights, reduction=reduction), changed, weight, bias)
    torch.testing.assert_close(actual, expected)
    assert not actual[1].view(-1, D)[[1, 11]].any()


@pytest.mark.parametrize("index", [-1, 5])
def test_another_index_may_be_ignored_which_may_be_a_column(index):
    args, (target, _) = inputs(), targets()
    target = target.where(target != 5, 6)
    other = target.where(target != -100, index)
    actual = with_grads(loss(other, ignore_index=index), *args)
    assert_same_bits(actual, with_grads(loss(target), *args))


@each_reduction
@pytest.mark.parametrize("leading", [(3, 4), (0,), (2, 0)], ids=str)
def test_without_a_token_that_counts_all_is_zero(leading, reduction):
    call = loss(torch.full(leading, -100), reduction=reduction)
    results = with_grads(call, *inputs(leading))
    assert not any(t.any() or t.isnan().any() for t in results)
    assert results[0].shape == (leading if reduction == "none" else ())
    assert [t.shape for t in results[1:]] == [(*leading, D), (V, D), (V,)]


@each_reduction
def test_same_bits_every_run_with_any_strides_and_no_argument_is_changed(reduction):
    args, given = inputs(), targets()
    before, call = [t.clone() for t in (*args, *given)], loss(*given, reduction=reduction)
    expected = with_grads(call, *args)
    assert_same_bits(with_grads(call, *args), expected)
    assert_same_bits((*args, *given), before)
    x, weight, bias = args
    args = x.transpose(0, 2).contiguous().transpose(0, 2), weight.T.contiguous().T
    args += (bias.repeat_interleave(2)[::2],)
    spread = (torch.stack([t, t], -1)[..., 0] for t in given)
    torch.testing.assert_close(with_grads(loss(*spread, reduction=reduction), *args), expected)


# what autograd offers around a backward


@each_reduction
def test_what_is_frozen_gets_no_gradient_and_no_matmul(reduction):
    args, chunks, call = inputs(), 3, loss(targets()[0], reduction=reduction)
    with torch.no_grad():
        expected = call(*(t.clone().requires_grad_() for t in args))
    assert not expected.requires_grad
    for wanted in ((1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)):
        own = [t.clone().requires_grad_(bool(w)) for t, w in zip(args, wanted, strict=True)]
        with Ops() as ops:
            y = call(*own)
            if any(wanted):
                y.sum().backward()
        assert [t.grad is not None for t in own] == list(map(bool, wanted))
        assert torch.equal(y, expected) and y.requires_grad == any(wanted)
        forwards = 2 if reduction == "none" and any(wanted) else 1
        matmuls = [name for name, _ in ops.calls if name in ("mm", "addmm", "addmm_")]
        assert len(matmuls) == chunks * (forwards + sum(wanted[:2]))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@each_reduction
def test_a_retained_graph_gives_the_same_bits_again(reduction, dtype):
    args = leaves(dtype)
    y = loss(targets()[0], reduction=reduction)(*args)
    upstream = 1 + torch.rand_like(y)
    first = torch.autograd.grad(y, args, upstream, retain_graph=True)
    before = [t.clone() for t in first]
    second = torch.autograd.grad(y, args, upstream, retain_graph=True)
    for again in (first, second, torch.autograd.grad(y, args, upstream)):
        assert_same_bits(again, before)


def test_the_incoming_gradient_may_have_any_strides():
    args = leaves()
    losses = loss(targets()[0], reduction="none")(*args)
    for dloss in (torch.randn(1, 1).expand(LEADING), torch.randn(9, 2).T):
        actual, expected = (
            torch.autograd.grad(losses, args, dy, retain_graph=True)
            for dy in (dloss, dloss.contiguous().clone())
        )
        assert_same_bits(actual, expected)


@each_reduction
def test_autocast_runs_the_matmuls_in_bfloat16_and_gradients_keep_their_dtypes(reduction):
    args, call = leaves(), loss(targets()[0], reduction=reduction)
    halves = [a.detach().bfloat16().requires_grad_() for a in args]
    with torch.autocast(args[0].device.type, torch.bfloat16):
        y, expected = call(*args), call(*halves)
        assert torch.equal(y, expected) and y.dtype == torch.float32
        inside = torch.autograd.grad(y.sum(), args, retain_graph=True)
    outside = torch.autograd.grad(y.sum(), args)
    assert [t.dtype for t in outside] == [torch.float32] * 3
    assert_same_bits(inside, outside)
    for a, b in zip(outside, torch.autograd.grad(expected.sum(), halves), strict=True):
        torch.testing.assert_close(a.bfloat16(), b, rtol=2**-7, atol=1e-5)


@BY_ONE
@pytest.mark.parametrize("reduction", REDUCTIONS[1:])
def test_compiles_without_graph_breaks(reduction):
    args, call = inputs(), loss(*targets(), reduction=reduction)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert_same_bits(with_grads(compiled, *args), with_grads(call, *args))


@each_reduction
@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
@BY_ONE
def test_plain_torch_agrees_with_differences_in_float64(reduction, given, monkeypatch):
    monkeypatch.setattr(module, "TILE", 2)
    x, weight, bias = torch.randn(5, 3), torch.randn(6, 3), torch.randn(6)
    args = [a.double().requires_grad_() for a in (x, weight, bias)[:given]]
    target = torch.tensor([0, 5, -100, 3, 3])
    call = loss(target, torch.rand(5).double(), reduction=reduction)
    assert torch.autograd.gradcheck(call, args)


@each_reduction
def test_refuses_a_second_derivative(reduction):
    args = leaves()
    total = loss(targets()[0], reduction=reduction)(*args).sum()
    with pytest.raises(RuntimeError, match="linear_cross_entropy has no second derivative"):
        torch.autograd.grad(total, args, create_graph=True)


def test_small_upstream_gradients_are_not_lost_in_float16():
    args = leaves(torch.float16)
    total = loss(targets()[0], reduction="sum")(*args)
    whole = torch.autograd.grad(total, args, torch.tensor(1.0), retain_graph=True)
    # itself a number that float16 can only round, by a sixtieth
    small = torch.autograd.grad(total, args, torch.tensor(1.8e-6 / 1.03))
    for a, b in zip(whole, small, strict=True):
        torch.testing.assert_close(b.float(), a.float() * 1.8e-6 / 1.03, rtol=1e-3, atol=4e-8)


@pytest.mark.parametrize("target", [-1, V, 127, 2**40])  # 127 lies in the padding of a row
def test_an_unknown_target_is_an_error_on_a_cpu(target):
    x, weight, _ = (t.cpu() for t in inputs())
    unknown = torch.full(LEADING, 3, device="cpu")
    unknown[1, 8] = target
    with pytest.raises(ValueError, match=f"target must be 0 to 69, .* = -100, got {target}$"):
        linear_cross_entropy(x, weight, unknown)


ONES, META = torch.ones, {"device": "meta"}
REJECTED = [
    ({"reduction": "batch"}, "reduction must be one of mean, sum, none, got batch"),
    ({"x": ONES(2, 9, 11)}, r"x and weight must be .*, got \(2, 9, 11\) and \(70, 12\)"),
    ({"x": ONES(())}, r"x and weight must be .*, got \(\) and \(70, 12\)"),
    ({"weight": ONES(12)}, r"x and weight must be .*, got \(2, 9, 12\) and \(12,\)"),
    ({"weight": ONES(0, 12)}, r"V and D at least 1, got .* and \(0, 12\)"),
    ({"x": ONES(2, 9, 12).long()}, "x must be one of float32, .*, got torch.int64"),
    ({"bias": ONES(69)}, r"bias must be \(70,\), got \(69,\)"),
    ({"bias": ONES(70, **META)}, "must be on one device, got"),
    ({"target": ONES(2, 9).int()}, "target must be int64 on .*, got torch.int32 on"),
    ({"target": ONES(2, 9, **META).long()}, "target must be int64 .* on meta"),
    ({"target": ONES(18).long()}, r"target must be \(2, 9\), got \(18,\)"),
    ({"token_weight": ONES(9)}, r"token_weight must be \(2, 9\), got \(9,\)"),
    ({"token_weight": ONES(2, 9).bool()}, "token_weight must be one of float32"),
    ({"token_weight": ONES(2, 9, requires_grad=True)}, "token_weight must not require a gradient"),
]


@pytest.mark.parametrize(("changes", "message"), REJECTED)
def test_rejects(changes, message):
    x, weight, bias = inputs()
    given = {"x": x, "weight": weight, "target": targets()[0], "bias": bias}
    moved = {n: t.to(x.device) if getattr(t, "is_cpu", False) else t for n, t in changes.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **moved})


# the gradient of softmax, which is written over the logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
# (rows, V): one column, a ragged line, a whole line, more tiles than one of 64 columns
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 64), (4, 150)], ids=str)
def test_the_gradient_of_softmax_is_as_accurate_as_eager(shape, dtype):
    assert_gradient_accurate(*shape, dtype)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_any_number_of_rows_is_done_at_once(rows, monkeypatch):
    padded, target, scale = logits(9, 37, torch.bfloat16)
    expected = run(padded, target, scale, 37)
    monkeypatch.setattr(activations, "CHUNK", rows * 64 // torch.get_num_threads())
    torch.testing.assert_close(run(padded, target, scale, 37), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype):
    padded, target, scale = logits(2, 130, dtype)
    padded[:, :130] = 0
    padded[0, 129], padded[1, 3] = 1e4, -1e4
    target[:], scale[:] = torch.tensor([0, 3]), 1
    nll, dx = run(padded, target, scale, 130)
    large = padded[0, 129].float().item()
    assert nll.tolist() == pytest.approx([large, large + math.log(129)], rel=1e-6)
    assert dx[0, [0, 1, 129]].tolist() == [-1, 0, 1]
    assert dx[1, [0, 3]].tolist() == pytest.approx([1 / 129, -1], rel=1e-2)


def test_columns_that_cannot_be_have_no_probability():
    padded, target, scale = logits(2, 150)
    padded[:, :100] = -math.inf  # more than the whole first tile
    target[:], scale[:] = 120, 1
    nll, dx = run(padded, target, scale, 150)
    torch.testing.assert_close(
        nll, F.cross_entropy(padded[:, 100:150], target - 100, reduction="none")
    )
    assert not dx[:, :100].any() and dx.isfinite().all()


def test_a_fault_upstream_stays_visible_in_its_row():
    padded, target, scale = logits(4, 150)
    padded[0, 70], padded[3, :150] = math.nan, -math.inf
    target[:], scale[:] = 5, 1
    nll, dx = run(padded, target, scale, 150)
    assert nll.isnan().tolist() == [True, False, False, True]
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("target", [-1, 37, 63, 2**40])
def test_an_unknown_target_that_nobody_looks_at_has_a_loss_of_nan(target, implementation):
    padded, targets, scale = logits(3, 37)
    targets[:], scale[:] = torch.tensor([1, IGNORED, target]), torch.tensor([1, 0, 1])
    launcher, nll = getattr(module, f"_gradient_{implementation}"), torch.empty(3)
    launcher(padded, targets, scale, nll, 37, IGNORED)
    assert nll.isnan().tolist() == [False, False, True]
    assert padded[:, :37].isnan().all(1).tolist() == [False, False, True]
    assert padded[:2, :37].isfinite().all()


@pytest.mark.parametrize("V", [1, 64, 65])
def test_rows_begin_on_a_line(V):
    padded = module.empty_logits(3, V, torch.bfloat16, None)
    assert padded.shape == (3, 64 if V <= 64 else 128) and padded.is_contiguous()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_formed_torch_op_that_writes_its_outputs_alone(scaled, dtype):
    padded, target, scale = logits(3, 64, dtype)
    call = partial(run, padded, target, scale if scaled else None, 64)
    opcheck_calls(call)
    assert_calls_stay_within_their_tensors(call)
