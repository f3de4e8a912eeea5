from functools import partial

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.one_head import DTYPES, LEADING, NAMES, REDUCTIONS, TILE, D, V, inputs, module, op, targets

from dbkernels.ops import linear_cross_entropy, reference
from dbkernels.ops.backend.register import use_implementation


@pytest.fixture(params=["triton", "torch"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(module, "TILE", TILE)
    with use_implementation(request.param):
        yield request.param


def assert_accurate(args, target, token_weight=None, **options):
    def by(f, dtype=None):
        wide = token_weight if dtype is None or token_weight is None else token_weight.to(dtype)
        call = partial(op, f, target, token_weight=wide, **options)
        return with_grads(call, *(a if dtype is None else a.to(dtype) for a in args))

    actual, eager = by(linear_cross_entropy), by(reference.linear_cross_entropy)
    exact = by(reference.linear_cross_entropy, torch.float64)
    for name, *results in zip(NAMES, actual, eager, exact, strict=False):
        assert_as_accurate_as_eager(name, *results)
    assert [t.dtype for t in actual] == [torch.float32, *(a.dtype for a in args)]


@pytest.mark.parametrize("given", [2, 3], ids=["without bias", "with bias"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_accurate_as_eager(dtype, reduction, given):
    target, token_weight = targets()
    args = inputs(dtype=dtype)[:given]
    assert_accurate(args, target, token_weight if given == 3 else None, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leading", [(), (1,), (16,), (2, 3, 4)], ids=str)
def test_any_leading_shape(leading, reduction):
    target = torch.randint(0, V, leading)
    assert_accurate(inputs(leading), target, torch.full(leading, 0.7), reduction=reduction)


@pytest.mark.parametrize("dtypes", [DTYPES[:2], DTYPES[1::-1], DTYPES[1:]], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_x_weight_and_bias_may_have_dtypes_of_their_own(dtypes, reduction, monkeypatch):
    monkeypatch.setattr(module, "TILE", 64)
    x, weight, bias = inputs()
    args = [x.to(dtypes[0]), weight.to(dtypes[1]), bias.to(dtypes[0])]
    assert_accurate(args, *targets(), reduction=reduction)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_chunks_add_up_to_the_whole(reduction, monkeypatch):
    args, (target, token_weight) = inputs(), targets()
    call = partial(op, linear_cross_entropy, target, token_weight=token_weight, reduction=reduction)
    parts = with_grads(call, *args)
    monkeypatch.setattr(module, "TILE", 64)
    for part, whole in zip(parts, with_grads(call, *args), strict=True):
        torch.testing.assert_close(part, whole)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_many_small_parts_in_bfloat16_are_not_lost(reduction, monkeypatch):
    monkeypatch.setattr(module, "tokens_per_chunk", lambda *sizes: 1)
    # one token of 256 and many of 1/2, each half a unit in the last place of the first
    x = torch.full((65, 1), 0.5).index_fill(0, torch.tensor(0), 256).bfloat16()
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    target = torch.zeros(65, dtype=torch.int64)
    loss = linear_cross_entropy(x, weight, target, bias=bias, reduction=reduction).sum()
    dweight, dbias = torch.autograd.grad(loss, [weight, bias])
    assert dweight.view(-1).tolist() == [-144, 144] and dbias.tolist() == [-32.5, 32.5]


@pytest.mark.parametrize(
    ("shape", "chunk"),
    [
        ((16384, 50257, 768), 1024),
        ((10**6, 50257, 768), 15360),  # as large as x
        ((10**6, 50257, 64), 4096),
        ((2048, 5003, 64), 128),
        ((2047, 16, 768), 98304),
        ((0, 5, 3), 128),
    ],
)
def test_a_chunk_depends_on_sizes_alone(shape, chunk, monkeypatch):
    monkeypatch.undo()
    assert module.tokens_per_chunk(*shape) == chunk


def test_the_mean_is_over_the_tokens_that_count_whatever_their_weights():
    args, (target, token_weight) = inputs(), targets()
    losses = op(linear_cross_entropy, target, *args, token_weight=token_weight, reduction="none")
    mean = op(linear_cross_entropy, target, *args, token_weight=token_weight)
    torch.testing.assert_close(mean, losses.sum() / (18 - 2))
    assert losses.view(-1)[[1, 11]].tolist() == [0, 0] and losses.count_nonzero() == 16


def test_the_mean_rounds_the_gradient_of_x_no_more_often_than_eager():
    args, (target, _) = inputs(dtype=torch.bfloat16), targets()
    target[0, :3] = -100  # 14 tokens count, so a division by them would round once more
    dx = with_grads(partial(op, linear_cross_entropy, target), *args)[1]
    eager = with_grads(partial(op, reference.linear_cross_entropy, target), *args)[1]
    assert (dx == eager).float().mean() > 0.95


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_an_ignored_token_has_no_part_in_anything(reduction):
    (x, weight, bias), (target, token_weight) = inputs(), targets()
    call = partial(op, linear_cross_entropy, target, reduction=reduction)
    expected = with_grads(partial(call, token_weight=token_weight), x, weight, bias)
    changed, weights = x.clone(), token_weight.clone()
    changed.view(-1, D)[[1, 11]] = 3.0
    weights.view(-1)[[1, 11]] = torch.nan
    actual = with_grads(partial(call, token_weight=weights), changed, weight, bias)
    for name, now, before in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(now, before, msg=name)
    assert not actual[1].view(-1, D)[[1, 11]].any()


def test_another_index_may_be_ignored():
    args, (target, _) = inputs(), targets()
    expected = with_grads(partial(op, linear_cross_entropy, target), *args)
    other = target.where(target != -100, -1)
    actual = with_grads(partial(op, linear_cross_entropy, other, ignore_index=-1), *args)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("leading", [(3, 4), (0,), (2, 0)], ids=str)
def test_without_a_token_that_counts_all_is_zero(leading, reduction):
    target = torch.full(leading, -100)
    results = with_grads(
        partial(op, linear_cross_entropy, target, reduction=reduction), *inputs(leading)
    )
    assert not any(t.any() or t.isnan().any() for t in results)
    assert results[0].shape == (leading if reduction == "none" else ())
    assert [t.shape for t in results[1:]] == [(*leading, D), (V, D), (V,)]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_large_logits_do_not_overflow(reduction):
    (x, weight, bias), (target, _) = inputs(), targets()
    call = partial(op, linear_cross_entropy, target, reduction=reduction)
    results = with_grads(call, 1e4 * x, weight, bias)
    assert all(t.isfinite().all() for t in results) and results[0].abs().max() > 1e3


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_same_bits_every_run(reduction):
    args, (target, token_weight) = inputs(dtype=torch.bfloat16), targets()
    options = {"token_weight": token_weight, "reduction": reduction}
    call = partial(op, linear_cross_entropy, target, **options)
    assert all(map(torch.equal, with_grads(call, *args), with_grads(call, *args)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_changes_none_of_its_arguments(reduction):
    args, others = inputs(), targets()
    before = [t.clone() for t in (*args, *others)]
    with_grads(partial(op, linear_cross_entropy, others[0], token_weight=others[1]), *args)
    assert all(map(torch.equal, (*args, *others), before))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_arguments_may_have_any_strides(reduction):
    (x, weight, bias), (target, token_weight) = inputs(), targets()
    call = partial(op, linear_cross_entropy, reduction=reduction)
    expected = with_grads(partial(call, target, token_weight=token_weight), x, weight, bias)
    args = x.transpose(0, 2).contiguous().transpose(0, 2), weight.T.contiguous().T
    args += (bias.repeat_interleave(2)[::2],)
    target, token_weight = (torch.stack([t, t], -1)[..., 0] for t in (target, token_weight))
    actual = with_grads(partial(call, target, token_weight=token_weight), *args)
    for name, now, before in zip(NAMES, actual, expected, strict=True):
        torch.testing.assert_close(now, before, msg=name)


@pytest.mark.parametrize("target", [-1, V])
def test_an_unknown_target_is_an_error_on_a_cpu(target):
    x, weight, _ = (t.cpu() for t in inputs())
    unknown = torch.full(LEADING, 3, device="cpu")
    unknown[1, 8] = target
    with pytest.raises(ValueError, match=f"target must be 0 to 69, .* = -100, got {target}$"):
        linear_cross_entropy(x, weight, unknown)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduction": "batch"}, "reduction must be one of mean, sum, none, got batch"),
        (
            {"x": torch.ones(2, 9, 11)},
            r"x and weight must be .*, got \(2, 9, 11\) and \(70, 12\)",
        ),
        ({"x": torch.ones(())}, r"x and weight must be .*, got \(\) and \(70, 12\)"),
        ({"weight": torch.ones(12)}, r"x and weight must be .*, got \(2, 9, 12\) and \(12,\)"),
        ({"weight": torch.ones(0, 12)}, r"V and D at least 1, got .* and \(0, 12\)"),
        ({"x": torch.ones(2, 9, 12).long()}, "x must be one of float32, .*, got torch.int64"),
        ({"bias": torch.ones(69)}, r"bias must be \(70,\), got \(69,\)"),
        ({"bias": torch.ones(70, device="meta")}, "must be on one device, got"),
        ({"target": torch.ones(2, 9).int()}, "target must be int64 on .*, got torch.int32 on"),
        ({"target": torch.ones(2, 9, device="meta").long()}, "target must be int64 .* on meta"),
        ({"target": torch.ones(18).long()}, r"target must be \(2, 9\), got \(18,\)"),
        ({"token_weight": torch.ones(9)}, r"token_weight must be \(2, 9\), got \(9,\)"),
        ({"token_weight": torch.ones(2, 9).bool()}, "token_weight must be one of float32"),
        (
            {"token_weight": torch.ones(2, 9, requires_grad=True)},
            "token_weight must not require a gradient",
        ),
    ],
)
def test_rejects(changes, message):
    x, weight, bias = inputs()
    device = x.device
    given = {"x": x, "weight": weight, "target": targets()[0], "bias": bias}
    moved = {n: t.to(device) if getattr(t, "is_cpu", False) else t for n, t in changes.items()}
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(**{**given, **moved})
