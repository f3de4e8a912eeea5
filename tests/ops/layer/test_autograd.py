"""The layer's gradients under everything that autograd offers around a backward."""

import pytest
import torch
from ops.one_layer import (
    EVERY_POLICY,
    OneLayer,
    Ops,
    assert_same_bits,
    gradients,
    in_autocast,
    saved_by,
)
from torch.utils.checkpoint import checkpoint

from dbkernels.ops import adaln_layer
from dbkernels.ops.layer.tensors import Activations, Kept

QUERIES = pytest.mark.parametrize("num_queries", [None, 2])


def overwritten(layer, *, retain_graph, **options):
    """Widths of the kept tensors that the backward left other numbers in."""
    leaves = layer.leaves()
    y, kept = saved_by(lambda: layer.run(leaves, **options))
    before = {address: t.detach().clone() for address, t in kept.items()}
    gradients(y.sum(), leaves, retain_graph=retain_graph)
    return sorted(t.shape[-1] for address, t in kept.items() if not torch.equal(t, before[address]))


# a, m, qkv and hidden become the gradients of their own; qkv cannot where its norm is read again
@pytest.mark.parametrize(
    ("options", "recompute", "num_queries", "widths"),
    [
        ({"qk_norm": False}, "none", None, [24, 24, 40, 72]),
        ({"qk_norm": False, "rotated": True}, "none", None, [24, 24, 40, 72]),
        ({"qk_norm": True, "mlp": "swiglu"}, "none", None, [24, 24, 80]),
        ({"qk_norm": False}, "attention", None, [24, 24, 40, 72]),
        ({"qk_norm": False}, "mlp", None, [24, 24, 72]),
        ({"qk_norm": False}, "qkv", None, [24, 24]),
        ({"qk_norm": False}, "layer", None, []),
        ({"qk_norm": False, "rotated": True}, "none", 2, [24, 24, 24, 40, 48]),
        ({"qk_norm": True, "rotated": True}, "none", 2, [24, 24, 40]),
    ],
)
def test_the_last_backward_writes_over_what_was_kept(options, recompute, num_queries, widths):
    layer, told = OneLayer(**options), {"recompute": recompute, "num_queries": num_queries}
    assert overwritten(layer, retain_graph=False, **told) == widths
    assert overwritten(layer, retain_graph=True, **told) == []


@QUERIES
@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_retained_graph_gives_the_same_bits_again(recompute, qk_norm, num_queries):
    layer, told = OneLayer(rotated=True, qk_norm=qk_norm), {"recompute": recompute}
    leaves, told["num_queries"] = layer.leaves(), num_queries
    expected = gradients(layer.run(leaves, **told).sum(), leaves)
    y = layer.run(leaves, **told).sum()
    for retain in (True, True, False):
        assert_same_bits(gradients(y, leaves, retain_graph=retain), expected)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, leaves)


def test_whoever_else_saved_what_is_written_over_gets_an_error():
    saved, weight = torch.ones(3), torch.ones(3, requires_grad=True)
    y = (saved * weight).sum()
    nothing = Activations(*(None for _ in Activations._fields))
    assert Kept(nothing, owned=True).buffer(saved) is saved
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize(
    "move",
    [
        torch.autograd.graph.save_on_cpu,
        lambda: torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone),
    ],
    ids=["to the CPU", "copied"],
)
def test_kept_tensors_may_be_moved_away_and_back(move):
    layer = OneLayer(rotated=True)

    def moved(*args, **options):
        with move():
            return adaln_layer(*args, **options)

    assert_same_bits(layer.with_grads(moved), layer.with_grads())


@pytest.mark.parametrize("recompute", ["none", "mlp"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_around_it_gives_the_same_bits(use_reentrant, recompute):
    layer = OneLayer(rotated=True)
    leaves, again = layer.leaves(), layer.leaves()
    layer.run(leaves).square().sum().backward()

    def run(*tensors):
        return layer.run(dict(zip(again, tensors, strict=True)), recompute=recompute)

    # a reentrant checkpoint has no torch.autograd.grad
    checkpoint(run, *again.values(), use_reentrant=use_reentrant).square().sum().backward()
    assert_same_bits(*({n: t.grad for n, t in own.items()} for own in (again, leaves)))


def test_hooks_of_tensors_see_and_change_gradients():
    layer, seen, accumulated = OneLayer(), [], []
    expected = gradients(layer.run(leaves := layer.leaves()).sum(), leaves)
    leaves = layer.leaves()
    for name, leaf in leaves.items():
        leaf.register_hook(lambda grad, name=name: seen.append(name) or 2 * grad)
        leaf.register_post_accumulate_grad_hook(lambda _, name=name: accumulated.append(name))
    layer.run(leaves).sum().backward()
    assert sorted(seen) == sorted(accumulated) == sorted(leaves)
    assert_same_bits(
        {name: t.grad for name, t in leaves.items()}, {n: 2 * g for n, g in expected.items()}
    )


@QUERIES
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(recompute, num_queries):
    layer, told = OneLayer(rotated=True), {"recompute": recompute, "num_queries": num_queries}
    names = list(layer.tensors)
    expected = gradients(layer.run(leaves := layer.leaves(), **told).sum(), leaves)
    for frozen in (*([name] for name in names), names[2:], names[:2]):
        leaves = layer.leaves()
        for name in frozen:
            leaves[name].requires_grad_(False)
        layer.run(leaves, **told).sum().backward()
        assert all(leaves[name].grad is None for name in frozen)
        rest = [name for name in names if name not in frozen]
        assert_same_bits({n: leaves[n].grad for n in rest}, {n: expected[n] for n in rest})


@QUERIES
@pytest.mark.parametrize(
    "name", ["qkv_weight", "qkv_bias", "out_weight", "out_bias", "fc1_weight", "fc2_weight"]
)
def test_a_gradient_that_nobody_wants_costs_no_op(name, num_queries):
    def ops(wanted):
        leaves = layer.leaves()
        leaves[name].requires_grad_(wanted)
        y = layer.run(leaves, num_queries=num_queries).sum()
        with Ops() as seen:
            gradients(y, leaves)
        return len(seen.calls)

    layer = OneLayer()
    assert ops(False) < ops(True)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_takes_any_layout_of_gradient(recompute, per_token):
    layer = OneLayer(rotated=True, per_token=per_token)
    leaves = layer.leaves()
    y = layer.run(leaves, recompute=recompute)
    dy = torch.randn_like(y[:1]).expand_as(y)
    expected = gradients(y, leaves, dy.contiguous(), retain_graph=True)
    for upstream in (dy, dy.mT.contiguous().mT, torch.stack([dy, dy], dim=-1)[..., 1]):
        assert not upstream.is_contiguous()
        assert_same_bits(gradients(y, leaves, upstream, retain_graph=True), expected)


def test_a_backward_inside_autocast_gives_the_same_bits():
    layer = OneLayer(rotated=True)
    leaves = layer.leaves()
    for op in (adaln_layer, in_autocast(adaln_layer)):
        y = layer.run(leaves, op).sum()
        expected = gradients(y, leaves, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            assert_same_bits(gradients(y, leaves), expected)


def test_refuses_a_second_derivative():
    leaves = (layer := OneLayer()).leaves()
    sentence = "^adaln_layer has no second derivative: call backward without create_graph=True$"
    with pytest.raises(RuntimeError, match=sentence):
        gradients(layer.run(leaves).sum(), leaves, create_graph=True)
