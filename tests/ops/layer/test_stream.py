"""The residual stream that a stack of layers keeps once for several of them."""

import pytest
import torch
from ops.one_layer import OneLayer, assert_close, assert_same_bits, gradients, saved_bytes

from dbkernels.ops.layer.tensors import LENGTH, ResidualStream

DEPTH = 2 * LENGTH + 1  # runs of LENGTH, LENGTH and 1


class Stack:
    """Layers of weights of their own, and the first one's x."""

    def __init__(self, depth=DEPTH, *, B=2, **options):
        self.layers = [OneLayer(B, qk_norm=False, **options) for _ in range(depth)]
        self.leaves = {
            f"{place} {name}": leaf
            for place, layer in enumerate(self.layers)
            for name, leaf in layer.leaves().items()
            if name != "x" or place == 0
        }
        self.x = self.leaves["0 x"]

    def run(self, stream, *, x=None, places=None, num_queries=(), **options):
        """The layers at some places, the last of which give so many tokens."""
        places = range(len(self.layers)) if places is None else places
        tokens = [None] * (len(places) - len(num_queries)) + list(num_queries)
        x = self.x if x is None else x
        for place, queries in zip(places, tokens, strict=True):
            own = {n.split()[1]: t for n, t in self.leaves.items() if n.startswith(f"{place} ")}
            x = self.layers[place].run(
                {**own, "x": x}, stream=stream, num_queries=queries, **options
            )  # fmt: skip
        return x

    def gradients(self, out, **options):
        return {"out": out, **gradients(out.square().sum(), self.leaves, **options)}


@pytest.mark.parametrize("B", [2, 0])
@pytest.mark.parametrize(
    ("per_token", "num_queries"), [(False, ()), (True, ()), (False, (3, 2)), (True, (3,))]
)
@pytest.mark.parametrize("recompute", ["none", "attention", "mlp", "qkv", "layer"])
def test_the_same_bits_with_and_without(recompute, per_token, B, num_queries):
    stack = Stack(LENGTH if num_queries else DEPTH, B=B, per_token=per_token)
    told = {"recompute": recompute, "num_queries": num_queries}
    assert_same_bits(*(stack.gradients(stack.run(s, **told)) for s in (ResidualStream(), None)))


@pytest.mark.parametrize("recompute", ["none", "attention", "mlp", "qkv"])
@pytest.mark.parametrize(
    ("depth", "num_queries", "spared"),
    [(LENGTH, (), LENGTH - 1), (DEPTH, (), DEPTH - 3), (2, (1,), 1)],
)
def test_a_run_keeps_x_of_its_first_layer_alone(depth, num_queries, spared, recompute):
    stack, told = Stack(depth), {"recompute": recompute, "num_queries": num_queries}
    without, streamed = (
        saved_bytes(lambda stream=stream: stack.run(stream, **told))
        for stream in (None, ResidualStream())
    )
    assert without - streamed == spared * stack.x.nbytes


BETWEEN = {  # what stands between two layers, and whether the run goes on
    "a view of all": (lambda x: x.view_as(x), True),
    "another shape": (lambda x: x.view(1, -1, x.shape[-1]).view(x.shape).transpose(1, 2), False),
    "a part": (lambda x: x[:1], False),
    "a change in place": (lambda x: x.mul_(2), False),
    "a change of a view": (lambda x: x.view_as(x).mul_(2), False),
    "a copy": (lambda x: x.clone(), False),
}


@pytest.mark.parametrize("between", list(BETWEEN))
def test_a_run_goes_on_from_a_view_of_its_end_and_from_nothing_else(between):
    # FSDP2 gives each layer such a view of what the layer before has left
    change, goes_on = BETWEEN[between]
    stack, stream = Stack(1), ResidualStream()
    out = stack.run(stream)
    run, _ = stream.run_to(change(out))
    assert (len(run) > 1) == goes_on


def test_the_same_bits_through_a_view_between_layers():
    stack = Stack(2)

    def viewed(stream):
        middle = stack.run(stream, places=[0])
        return stack.run(stream, x=middle.view_as(middle), places=[1])

    assert_same_bits(*(stack.gradients(viewed(s)) for s in (ResidualStream(), None)))


def test_another_operation_between_layers_starts_a_new_run():
    stack = Stack(2)

    def interrupted(stream):
        middle = stack.run(stream, places=[0])
        return stack.run(stream, x=2 * middle, places=[1])

    assert_same_bits(*(stack.gradients(interrupted(s)) for s in (ResidualStream(), None)))


def test_a_graph_may_be_retained():
    stack = Stack(3)
    out = stack.run(ResidualStream())
    first = stack.gradients(out, retain_graph=True)
    assert_same_bits(stack.gradients(out), first)


def test_a_gradient_in_the_middle_leaves_what_the_end_needs():
    stack, results = Stack(2), []
    for first in (False, True):
        stream = ResidualStream()
        middle = stack.run(stream, places=[0])
        out = stack.run(stream, x=middle, places=[1])
        if first:  # nothing is written over what the second layer has yet to read
            torch.autograd.grad(middle.sum(), stack.x)
        results.append(torch.autograd.grad(out.sum(), middle)[0])
    assert torch.equal(*results)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(middle.sum(), stack.x)


def test_nothing_is_followed_without_gradients():
    stack, stream = Stack(2), ResidualStream()
    with torch.no_grad():
        out = stack.run(stream)
    assert len(stream.run_to(out)[0]) == 1


def test_compiles_without_graph_breaks():
    stack = Stack(2)
    compiled = torch.compile(
        lambda x: stack.run(ResidualStream(), x=x), backend="aot_eager", fullgraph=True
    )
    expected = stack.gradients(stack.run(ResidualStream()))
    assert_close(stack.gradients(compiled(stack.x)), expected, 1e-4)
