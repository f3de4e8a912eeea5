"""The layer's gradients under everything that autograd offers around a backward."""

from collections import Counter

import pytest
import torch
from ops.one_layer import EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits, saved_by
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from dbkernels.ops import adaln_layer, reference
from dbkernels.ops.layer import branches, passes

BF16 = torch.bfloat16


def gradients(y, leaves, dy=None, **options):
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, **options)
    return dict(zip(wanted, grads, strict=True))


def overwritten(layer, *, retain_graph, **options):
    """Widths of the kept tensors that the backward left other numbers in."""
    leaves = layer.leaves()
    y, kept = saved_by(lambda: layer.run(leaves, **options))
    before = {address: t.detach().clone() for address, t in kept.items()}
    gradients(y.sum(), leaves, retain_graph=retain_graph)
    return sorted(t.shape[-1] for address, t in kept.items() if not torch.equal(t, before[address]))


# a, m, qkv and hidden become the gradients of their own; qkv cannot where its norm is read again
@pytest.mark.parametrize(
    ("options", "recompute", "widths"),
    [
        ({"qk_norm": False}, "none", [24, 24, 40, 72]),
        ({"qk_norm": False, "rotated": True}, "none", [24, 24, 40, 72]),
        ({"qk_norm": True, "mlp": "swiglu"}, "none", [24, 24, 80]),
        ({"qk_norm": False}, "attention", [24, 24, 40, 72]),
        ({"qk_norm": False}, "mlp", [24, 24, 72]),
        ({"qk_norm": False}, "qkv", [24, 24]),
        ({"qk_norm": False}, "layer", []),
    ],
)
def test_the_last_backward_writes_over_what_was_kept(options, recompute, widths):
    layer = OneLayer(**options)
    assert overwritten(layer, retain_graph=False, recompute=recompute) == widths
    assert overwritten(layer, retain_graph=True, recompute=recompute) == []


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_retained_graph_gives_the_same_bits_again(recompute, qk_norm):
    layer = OneLayer(rotated=True, qk_norm=qk_norm)
    leaves = layer.leaves()
    expected = gradients(layer.run(leaves, recompute=recompute).sum(), leaves)
    y = layer.run(leaves, recompute=recompute).sum()
    for retain in (True, True, False):
        assert_same_bits(gradients(y, leaves, retain_graph=retain), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, leaves)


def test_kept_tensors_may_be_moved_away_and_back():
    layer = OneLayer(rotated=True)
    expected = layer.with_grads()

    def moved(*args, **options):
        with torch.autograd.graph.save_on_cpu():
            return adaln_layer(*args, **options)

    assert_same_bits(layer.with_grads(moved), expected)

    def copied(*args, **options):
        with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
            return adaln_layer(*args, **options)

    assert_same_bits(layer.with_grads(copied), expected)


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_it_gives_the_same_bits(use_reentrant, recompute):
    layer = OneLayer(rotated=True)
    expected = layer.with_grads()

    def recomputed(x, modulation, weights, **options):
        def f(x, modulation, *weights):
            return adaln_layer(
                x, modulation, type(layer.weights)(*weights), recompute=recompute, **options
            )

        return checkpoint(f, x, modulation, *weights, use_reentrant=use_reentrant)

    leaves = layer.leaves()
    y = layer.run(leaves, recomputed)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y))
    results = {"out": y.detach(), **{name: t.grad for name, t in leaves.items()}}
    assert_same_bits(results, expected)


def test_two_micro_batches_add_up_to_one_batch():
    layer = OneLayer(4, dtypes=(torch.float64,) * 3)
    whole, halves = layer.leaves(), layer.leaves()
    layer.run(whole).square().sum().backward()
    for part in (slice(0, 2), slice(2, 4)):
        cut = {name: halves[name][part] for name in ("x", "modulation")}
        layer.run({**halves, **cut}).square().sum().backward()
    for name, leaf in whole.items():
        torch.testing.assert_close(halves[name].grad, leaf.grad, msg=name)


def test_hooks_of_tensors_see_and_change_gradients():
    layer = OneLayer()
    expected = gradients(layer.run(leaves := layer.leaves()).sum(), leaves)
    seen, leaves = [], layer.leaves()
    for name, leaf in leaves.items():
        leaf.register_hook(lambda grad, name=name: seen.append(name) or 2 * grad)
    accumulated = []
    for name, leaf in leaves.items():
        leaf.register_post_accumulate_grad_hook(lambda _, name=name: accumulated.append(name))
    layer.run(leaves).sum().backward()
    assert sorted(seen) == sorted(accumulated) == sorted(leaves)
    assert_same_bits({name: t.grad for name, t in leaves.items()}, {
        name: 2 * grad for name, grad in expected.items()
    })  # fmt: skip


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(recompute):
    layer = OneLayer(rotated=True)
    names = list(layer.tensors)
    weights = names[2:]
    expected = gradients(layer.run(leaves := layer.leaves(), recompute=recompute).sum(), leaves)
    for frozen in (*([name] for name in names), weights, ["x", "modulation"]):
        leaves = layer.leaves()
        for name in frozen:
            leaves[name].requires_grad_(False)
        layer.run(leaves, recompute=recompute).sum().backward()
        assert all(leaves[name].grad is None for name in frozen)
        assert_same_bits(
            {name: leaves[name].grad for name in names if name not in frozen},
            {name: expected[name] for name in names if name not in frozen},
        )


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_takes_any_layout_of_gradient(recompute, per_token):
    layer = OneLayer(rotated=True, per_token=per_token)
    leaves = layer.leaves()
    y = layer.run(leaves, recompute=recompute)
    dy = torch.randn_like(y[:1]).expand_as(y)
    transposed = dy.mT.contiguous().mT
    expected = gradients(y, leaves, dy.contiguous(), retain_graph=True)
    for upstream in (dy, transposed, torch.stack([dy, dy], dim=-1)[..., 1]):
        assert not upstream.is_contiguous()
        assert_same_bits(gradients(y, leaves, upstream, retain_graph=True), expected)


def test_leaves_the_upstream_gradient_alone():
    layer = OneLayer()
    leaves = layer.leaves()
    y = layer.run(leaves)
    dy = torch.randn_like(y)
    before, x = dy.clone(), leaves["x"].detach().clone()
    gradients(y, leaves, dy)
    assert torch.equal(dy, before) and torch.equal(leaves["x"], x)


def in_autocast(op):
    def f(*args, **options):
        with torch.autocast("cpu", BF16):
            return op(*args, **options)

    return f


@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "rotated": True, "per_token": True}])
def test_autocast_runs_the_branches_in_bfloat16_and_nothing_else(options):
    layer = OneLayer(3, 37, 128, 1, hidden=160, **options)
    results = [
        layer.with_grads(in_autocast(adaln_layer), recompute=recompute)
        for recompute in EVERY_POLICY
    ]
    for recompute, result in zip(EVERY_POLICY, results, strict=True):
        assert {t.dtype for t in result.values()} == {torch.float32}
        if recompute in SAME_BITS:
            assert_same_bits(result, results[0])
    assert not torch.equal(results[0]["out"], layer.run(layer.tensors))
    layer.compare(results, layer.with_grads(in_autocast(reference.adaln_layer)))


def test_autocast_keeps_no_copy_of_the_weights():
    leaves = (layer := OneLayer()).leaves()
    _, kept = saved_by(lambda: layer.run(leaves, in_autocast(adaln_layer)))
    for leaf in leaves.values():
        assert kept.pop(leaf.untyped_storage().data_ptr()).dtype == torch.float32
    # qkv, attended, a, hidden and m; logsumexp and the statistics of two norms
    assert Counter(t.dtype for t in kept.values()) == {BF16: 5, torch.float32: 3}


def test_a_backward_inside_autocast_gives_the_same_bits():
    layer = OneLayer(rotated=True)
    leaves = layer.leaves()
    for op in (adaln_layer, in_autocast(adaln_layer)):
        y = layer.run(leaves, op).sum()
        expected = gradients(y, leaves, retain_graph=True)
        with torch.autocast("cpu", BF16):
            assert_same_bits(gradients(y, leaves), expected)


def test_refuses_a_second_derivative():
    layer = OneLayer()
    leaves = layer.leaves()
    sentence = "^adaln_layer has no second derivative: call backward without create_graph=True$"
    with pytest.raises(RuntimeError, match=sentence):
        gradients(layer.run(leaves).sum(), leaves, create_graph=True)


def test_each_tensor_dies_with_its_last_use(monkeypatch):
    held, gone = {}, {}

    def watch(room, name, *, args, ask):
        original = getattr(room, name)

        def watched(*given, **options):
            gone[name] = [what for what in ask if held[what].expired()]
            for what, place in args.items():
                held[what] = StorageWeakRef(given[place].untyped_storage())
            return original(*given, **options)

        monkeypatch.setattr(room, name, watched)

    watch(branches, "mlp_backward", args={"dm": 0, "hidden": 2}, ask=[])
    watch(passes, "gated_adaln_norm_backward", args={}, ask=["dm", "hidden"])
    watch(branches, "attend_backward", args={"attended": 2}, ask=["dm", "hidden"])
    watch(passes, "adaln_norm_backward", args={}, ask=["attended"])
    layer = OneLayer()
    leaves = layer.leaves()
    gradients(layer.run(leaves).sum(), leaves)
    # dy is written over dm
    assert gone["gated_adaln_norm_backward"] == []
    assert gone["attend_backward"] == ["dm", "hidden"]
    assert gone["adaln_norm_backward"] == ["attended"]
