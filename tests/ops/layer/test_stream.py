import pytest
import torch

from dbkernels.ops import reference
from dbkernels.ops.layer.function import adaln_layer
from dbkernels.ops.layer.tensors import LENGTH, ResidualStream, end_of_run

B, T, D, H = 2, 5, 12, 3
DEPTH = 2 * LENGTH + 1  # runs of LENGTH, LENGTH and 1


def make_stack(depth=DEPTH, per_token=False):
    """x, and a modulation and weights of each layer, all of which require a gradient."""
    x = (torch.randn(B, T, D) + 1).requires_grad_()
    shapes = [(3 * D, D), (3 * D,), (D, D), (D,), (20, D), (20,), (D, 20), (D,)]
    condition = (B, T, 6 * D) if per_token else (B, 6 * D)
    layers = [
        (
            torch.randn(condition).mul(0.5).requires_grad_(),
            reference.LayerWeights(*(torch.randn(s).mul(0.3).requires_grad_() for s in shapes)),
        )
        for _ in range(depth)
    ]
    return x, layers


def run(x, layers, stream, recompute="none"):
    for modulation, weights in layers:
        x = adaln_layer(x, modulation, weights, num_heads=H, recompute=recompute, stream=stream)
    return x


def gradients(x, layers, out):
    weights = [w for _, layer in layers for w in layer if w is not None]
    wanted = [x, *(modulation for modulation, _ in layers), *weights]
    return torch.autograd.grad(out.square().sum(), wanted)


def stored_bytes(function, left_out):
    """Bytes of the storages that autograd keeps, each once."""
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    for tensor in left_out:
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(seen.values()), out


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("recompute", ["none", "attention", "mlp", "qkv", "layer"])
def test_the_same_bits_with_and_without(recompute, per_token):
    x, layers = make_stack(per_token=per_token)
    without, streamed = run(x, layers, None, recompute), run(x, layers, ResidualStream(), recompute)
    assert torch.equal(without, streamed)
    expected = gradients(x, layers, without)
    for actual, exact in zip(gradients(x, layers, streamed), expected, strict=True):
        assert torch.equal(actual, exact)


@pytest.mark.parametrize("recompute", ["none", "attention", "mlp", "qkv"])
def test_a_run_keeps_x_of_its_first_layer_alone(recompute):
    x, layers = make_stack(depth=LENGTH)
    weights = [w for _, layer in layers for w in layer if w is not None]
    without, _ = stored_bytes(lambda: run(x, layers, None, recompute), weights)
    streamed, _ = stored_bytes(lambda: run(x, layers, ResidualStream(), recompute), weights)
    assert without - streamed == (LENGTH - 1) * x.nbytes


def test_a_run_is_no_longer_than_length():
    x, layers = make_stack()
    weights = [w for _, layer in layers for w in layer if w is not None]
    without, _ = stored_bytes(lambda: run(x, layers, None), weights)
    streamed, _ = stored_bytes(lambda: run(x, layers, ResidualStream()), weights)
    assert without - streamed == (DEPTH - 3) * x.nbytes


def test_another_operation_between_layers_starts_a_new_run():
    x, layers = make_stack(depth=2)

    def interrupted(stream):
        middle = run(x, layers[:1], stream)
        return run(middle * 2, layers[1:], stream)

    expected = gradients(x, layers, interrupted(None))
    for actual, exact in zip(
        gradients(x, layers, interrupted(ResidualStream())), expected, strict=True
    ):
        assert torch.equal(actual, exact)


def test_a_graph_may_be_retained():
    x, layers = make_stack(depth=3)
    out = run(x, layers, ResidualStream())
    wanted = [x, *(modulation for modulation, _ in layers)]
    first = torch.autograd.grad(out.sum(), wanted, retain_graph=True)
    for actual, again in zip(torch.autograd.grad(out.sum(), wanted), first, strict=True):
        assert torch.equal(actual, again)


def test_a_layer_whose_run_was_used_up_says_so():
    x, layers = make_stack(depth=2)
    stream = ResidualStream()
    middle = run(x, layers[:1], stream)
    out = run(middle, layers[1:], stream)
    torch.autograd.grad(middle.sum(), x)  # writes gradients over what the first layer kept
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), middle)


def test_nothing_is_followed_without_gradients():
    x, layers = make_stack(depth=2)
    stream = ResidualStream()
    with torch.no_grad():
        out = run(x, layers, stream)
    assert len(stream.run_to(out)) == 1


def test_a_run_of_no_sums_is_its_start():
    start = torch.randn(B, T, D)
    assert end_of_run(start, []) is start


def test_x_of_a_run_leaves_its_start_alone():
    start, h = torch.randn(2, B, T, D)
    before, gate = start.clone(), torch.randn(B, D)
    x = end_of_run(start, [gate, h, gate, h])
    assert torch.equal(start, before)
    torch.testing.assert_close(x, start + 2 * gate[:, None] * h)


def test_an_empty_batch():
    x, layers = make_stack(depth=2)
    empty = [(modulation[:0], weights) for modulation, weights in layers]
    assert run(x[:0], empty, ResidualStream()).shape == (0, T, D)


def test_compiles_without_graph_breaks():
    x, layers = make_stack(depth=3)
    compiled = torch.compile(
        lambda x: run(x, layers, ResidualStream()), backend="aot_eager", fullgraph=True
    )
    expected = gradients(x, layers, run(x, layers, ResidualStream()))
    for actual, exact in zip(gradients(x, layers, compiled(x)), expected, strict=True):
        torch.testing.assert_close(actual, exact)
