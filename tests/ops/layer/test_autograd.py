"""What a layer promises of its inputs and its result, and under all that autograd offers."""

import pytest
import torch
from ops.one_layer import (
    EVERY_POLICY,
    KINDS,
    OneLayer,
    Ops,
    assert_close,
    assert_same_bits,
    gradients,
    in_autocast,
    saved_by,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from dbkernels.ops import adaln_layer, use_implementation
from dbkernels.ops.layer.tensors import Activations, Kept

EACH = {"mlp": "swiglu", "rotated": True, "per_token": True}
ASKED = [{}, {"num_queries": 2}, KINDS[-1]]  # of a layer; the first samples are a whole stream
LAYOUTS = {  # the same numbers in other places
    "transposed": lambda t: t.mT.contiguous().mT,
    "columns apart": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "slice of a wider one": lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
    "shared by samples": lambda t: t[:1].expand_as(t),
}


@pytest.mark.parametrize("per_token", [False, True])
def test_samples_do_not_see_each_other(per_token):
    layer = OneLayer(3, per_token=per_token)
    changed = {name: t.clone() for name, t in layer.tensors.items()}
    for name in ("x", "modulation"):
        changed[name][1] += 0.5
    before, after = layer.with_grads(), layer.with_grads(tensors=changed)
    for name in ("out", "x", "modulation"):
        torch.testing.assert_close(after[name][::2], before[name][::2])
        assert not torch.allclose(after[name][1], before[name][1])


@pytest.mark.parametrize("asked", ASKED, ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "modulation", "dout"])
def test_x_modulation_and_the_upstream_gradient_may_have_any_strides(
    name, layout, per_token, asked
):
    layer = OneLayer(4, rotated=True, per_token=per_token)
    asked = {**asked, "num_samples": 2} if "num_samples" in asked else asked
    out = layer.run(layer.tensors, **asked)
    given = {**layer.leaves(), "dout": torch.randn_like(out)}
    given[name] = LAYOUTS[layout](given[name].detach()).requires_grad_(name != "dout")
    dense = {name: t.detach().contiguous().requires_grad_() for name, t in given.items()}
    assert not given[name].is_contiguous()

    def results(dout, **leaves):
        y = layer.run(leaves, **asked)
        return {"out": y, **gradients(y, leaves, dout)}

    assert_same_bits(results(**given), results(**dense))


# plain torch takes any stride, the kernels read columns that follow each other
@pytest.mark.parametrize("layout", ["transposed", "columns apart"])
def test_kernels_take_a_modulation_of_any_strides(layout):
    layer = OneLayer(2, 2, 16, 2, hidden=8, qk_norm=False)
    expected = layer.run(layer.tensors)
    layer.tensors["modulation"] = LAYOUTS[layout](layer.tensors["modulation"])
    with use_implementation("triton"), torch.no_grad():
        torch.testing.assert_close(layer.run(layer.tensors), expected)


def test_without_gradients_nothing_changes_and_nothing_is_kept():
    layer = OneLayer()
    expected = layer.run(layer.leaves()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer.run(layer.leaves())
        assert y.grad_fn is None and torch.equal(y, expected)


@pytest.mark.parametrize(
    ("backend", "recompute", "asked", "options"),
    [
        ("inductor", "none", {}, {"norm": "rms", "bias": False, "qk_norm": False}),
        ("aot_eager", "layer", {"num_queries": 2}, EACH),
        ("aot_eager", "qkv", KINDS[1], EACH),
        ("aot_eager", "none", KINDS[2], {}),
        ("aot_eager", "layer", KINDS[3], EACH),
    ],
)
def test_compiles_without_graph_breaks(backend, recompute, asked, options):
    layer, told = OneLayer(**options), {"recompute": recompute, **asked}
    compiled = torch.compile(adaln_layer, backend=backend, fullgraph=True)
    assert_close(layer.with_grads(compiled, **told), layer.with_grads(**told), 1e-4)


# a GPU's kernels cannot run here, but what they are given and return has shapes: meta tensors go
# the way of a GPU's, and unlike fake ones can be written by `out=` without one
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("asked", [{"num_queries": 1}, {"num_queries": 3}, *KINDS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_has_shapes_before_it_has_data(recompute, dtype, asked, device):
    layer = OneLayer(**EACH, dtypes=(torch.float32, torch.float32, dtype))
    layer.options["rotary"] = None if device == "fake" else torch.empty(2, 5, 8, device="meta")
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        leaves = {
            name: torch.empty(t.shape, dtype=t.dtype).requires_grad_()
            for name, t in layer.tensors.items()
        }
        y = layer.run(leaves, recompute=recompute, **asked)
        y.sum().backward()
    assert y.shape == (asked.get("num_samples", 2), asked.get("num_queries", 5), 24)
    assert (y.dtype, y.device) == (torch.float32, leaves["x"].device)
    for name, leaf in leaves.items():
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype), name


each_asked = pytest.mark.parametrize("asked", ASKED, ids=str)


def overwritten(layer, *, retain_graph, **options):
    """Widths of the kept tensors that the backward left other numbers in."""
    leaves = layer.leaves()
    y, kept = saved_by(lambda: layer.run(leaves, **options))
    before = {address: t.detach().clone() for address, t in kept.items()}
    gradients(y.sum(), leaves, retain_graph=retain_graph)
    return sorted(t.shape[-1] for address, t in kept.items() if not torch.equal(t, before[address]))


# a, m, qkv and hidden become the gradients of their own; qkv cannot where its norm is read again
@pytest.mark.parametrize(
    ("options", "recompute", "asked", "widths"),
    [
        ({"qk_norm": False}, "none", {}, [24, 24, 40, 72]),
        ({"qk_norm": False, "rotated": True}, "none", {}, [24, 24, 40, 72]),
        ({"qk_norm": True, "mlp": "swiglu"}, "none", {}, [24, 24, 80]),
        ({"qk_norm": False}, "attention", {}, [24, 24, 40, 72]),
        ({"qk_norm": False}, "mlp", {}, [24, 24, 72]),
        ({"qk_norm": False}, "qkv", {}, [24, 24]),
        ({"qk_norm": False}, "layer", {}, []),
        ({"qk_norm": False}, "none", KINDS[2], [24, 24, 40, 72]),
        *(
            (options, "none", asked, widths)
            for asked in ASKED[1:]
            for options, widths in (
                ({"qk_norm": False, "rotated": True}, [24, 24, 24, 40, 48]),
                ({"qk_norm": True, "rotated": True}, [24, 24, 40]),
            )
        ),
    ],
)
def test_the_last_backward_writes_over_what_was_kept(options, recompute, asked, widths):
    layer, told = OneLayer(**options), {"recompute": recompute, **asked}
    assert overwritten(layer, retain_graph=False, **told) == widths
    assert overwritten(layer, retain_graph=True, **told) == []


@each_asked
@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_retained_graph_gives_the_same_bits_again_and_no_argument_is_changed(
    recompute, qk_norm, asked
):
    layer, told = OneLayer(rotated=True, qk_norm=qk_norm), {"recompute": recompute, **asked}
    leaves = layer.leaves()
    y = layer.run(leaves, **told)
    read = [dy := torch.randn_like(y), *(t.detach() for t in leaves.values())]
    before = [t.clone() for t in read]
    expected = gradients(layer.run(leaves, **told), leaves, dy)
    for retain in (True, True, False):
        assert_same_bits(gradients(y, leaves, dy, retain_graph=retain), expected)
        assert all(map(torch.equal, read, before))
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        gradients(y, leaves, dy)


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


ALONE = {"qkv_weight", "qkv_bias", "out_weight", "out_bias", "fc1_weight", "fc2_weight"}


@each_asked
@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(recompute, asked):
    layer, told = OneLayer(rotated=True), {"recompute": recompute, **asked}
    names = list(layer.tensors)
    y = layer.run(leaves := layer.leaves(), **told).sum()
    with Ops() as all_of_them:
        expected = gradients(y, leaves)
    for frozen in (*([name] for name in names), names[2:], names[:2]):
        leaves = layer.leaves()
        for name in frozen:
            leaves[name].requires_grad_(False)
        y = layer.run(leaves, **told).sum()
        with Ops() as seen:
            found = gradients(y, leaves)
        # which costs no op, where no kernel has it beside what somebody wants
        assert len(seen.calls) < len(all_of_them.calls) or not ALONE & {*frozen}
        assert_same_bits(found, {name: expected[name] for name in names if name not in frozen})


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
