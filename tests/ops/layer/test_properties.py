"""What a layer promises of its inputs and its result, beside the numbers."""

import pytest
import torch
from ops.one_layer import EVERY_POLICY, OneLayer, assert_close, assert_same_bits, gradients
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import adaln_layer, use_implementation

EACH = {"mlp": "swiglu", "rotated": True, "per_token": True}
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


@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["x", "modulation"])
def test_x_and_modulation_may_have_any_strides(name, layout, per_token, num_queries):
    layer = OneLayer(per_token=per_token)
    layer.tensors[name] = LAYOUTS[layout](layer.tensors[name])
    dense = {name: t.contiguous() for name, t in layer.tensors.items()}
    expected = layer.with_grads(tensors=dense, num_queries=num_queries)
    assert_same_bits(layer.with_grads(num_queries=num_queries), expected)


# plain torch takes any stride, the kernels read columns that follow each other
@pytest.mark.parametrize("layout", ["transposed", "columns apart"])
def test_kernels_take_a_modulation_of_any_strides(layout):
    layer = OneLayer(2, 2, 16, 2, hidden=8, qk_norm=False)
    expected = layer.run(layer.tensors)
    layer.tensors["modulation"] = LAYOUTS[layout](layer.tensors["modulation"])
    with use_implementation("triton"), torch.no_grad():
        torch.testing.assert_close(layer.run(layer.tensors), expected)


@pytest.mark.parametrize("num_queries", [None, 2])
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_inputs_and_the_upstream_gradient_are_left_alone(recompute, num_queries):
    layer = OneLayer(qk_norm=False)
    leaves = layer.leaves()
    y = layer.run(leaves, recompute=recompute, num_queries=num_queries)
    read = [torch.randn_like(y), *(t.detach() for t in leaves.values())]
    before = [t.clone() for t in read]
    gradients(y, leaves, read[0])
    assert all(map(torch.equal, read, before))


def test_without_gradients_nothing_changes_and_nothing_is_kept():
    layer = OneLayer()
    expected = layer.run(layer.leaves()).detach()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            y = layer.run(layer.leaves())
        assert y.grad_fn is None and torch.equal(y, expected)


@pytest.mark.parametrize(
    ("backend", "recompute", "num_queries", "options"),
    [
        ("aot_eager", "layer", None, {"norm": "rms", "bias": False, "qk_norm": False}),
        ("inductor", "none", None, {"norm": "rms", "bias": False, "qk_norm": False}),
        ("aot_eager", "none", 2, EACH),
    ],
)
def test_compiles_without_graph_breaks(backend, recompute, num_queries, options):
    layer, told = OneLayer(**options), {"recompute": recompute, "num_queries": num_queries}
    compiled = torch.compile(adaln_layer, backend=backend, fullgraph=True)
    assert_close(layer.with_grads(compiled, **told), layer.with_grads(**told), 1e-4)


# a GPU's kernels cannot run here, but what they are given and return has shapes: meta tensors go
# the way of a GPU's, and unlike fake ones can be written by `out=` without one
@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("num_queries", [None, 1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_has_shapes_before_it_has_data(recompute, dtype, num_queries, device):
    layer = OneLayer(**EACH, dtypes=(torch.float32, torch.float32, dtype))
    layer.options["rotary"] = None if device == "fake" else torch.empty(2, 5, 8, device="meta")
    with FakeTensorMode() if device == "fake" else torch.device("meta"):
        leaves = {
            name: torch.empty(t.shape, dtype=t.dtype).requires_grad_()
            for name, t in layer.tensors.items()
        }
        y = layer.run(leaves, recompute=recompute, num_queries=num_queries)
        y.sum().backward()
    assert y.shape == (2, num_queries or 5, 24)
    assert (y.dtype, y.device) == (torch.float32, leaves["x"].device)
    for name, leaf in leaves.items():
        assert (leaf.grad.shape, leaf.grad.dtype) == (leaf.shape, leaf.dtype), name
