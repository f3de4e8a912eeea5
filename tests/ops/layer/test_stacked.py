"""A weight of several tensors is the weight that they make, and so are its gradients."""

import pytest
import torch
from ops.one_layer import EVERY_POLICY, OneLayer, in_autocast, saved_bytes

from dbkernels.ops import Stacked, adaln_layer
from dbkernels.ops.layer.weights import LayerWeights

# rows of the queries, of the keys and of the values, which lie in tensors of their own here
SIZES = {"qkv": (24, 24, 24), "fc1": (50, 30)}


def orders():
    random = torch.Generator().manual_seed(1)
    return {name: torch.randperm(sum(sizes), generator=random) for name, sizes in SIZES.items()}


def run(layer, tensors, told):
    weights = {name: told.get(name, tensors.get(name)) for name in LayerWeights._fields[:-1]}
    weights = LayerWeights(**weights)
    return adaln_layer(tensors["x"], tensors["modulation"], weights, **layer)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_has_the_bits_of_one_tensor(recompute, autocast):
    layer = OneLayer(mlp="swiglu", rotated=True)
    options = {**layer.options, "recompute": recompute}
    f, found = (in_autocast(run) if autocast else run), {}
    leaves = layer.leaves()
    out = f(options, leaves, {})
    expected = torch.autograd.grad(out.square().sum(), list(leaves.values()))
    expected = dict(zip(leaves, expected, strict=True))

    others, told = layer.leaves(), {}
    for name, order in orders().items():
        for kind in ("weight", "bias"):
            whole = others.pop(f"{name}_{kind}").detach()
            parts = whole[order.argsort()].split(SIZES[name])  # so that [order] is the whole
            parts = [part.clone().requires_grad_() for part in parts]
            told[f"{name}_{kind}"] = Stacked(tuple(parts), order)
    again = f(options, others, told)
    assert torch.equal(again, out)
    given = [*others.values(), *(part for each in told.values() for part in each.parts)]
    grads = list(torch.autograd.grad(again.square().sum(), given))
    for name in others:
        found[name] = grads.pop(0)
    for name, each in told.items():
        parts = [grads.pop(0) for _ in each.parts]
        found[name] = torch.cat(parts)[each.order]
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())


def test_parts_that_are_frozen_have_no_gradient():
    layer = OneLayer()
    tensors = dict(layer.tensors)
    q, k, v = tensors.pop("qkv_weight").split(24)
    k.requires_grad_()
    run(layer.options, tensors, {"qkv_weight": Stacked((q, k, v))}).sum().backward()
    assert k.grad.abs().sum() > 0


def test_the_whole_is_not_kept_for_the_backward():
    layer = OneLayer()
    leaves = layer.leaves()
    parts = tuple(part.detach().requires_grad_() for part in leaves["qkv_weight"].split(24))
    told = {"qkv_weight": Stacked(parts)}
    held = [*leaves.values(), *parts]
    apart = saved_bytes(lambda: run(layer.options, leaves, told), but=held)
    assert apart == saved_bytes(lambda: run(layer.options, leaves, {}), but=held)


@pytest.mark.parametrize(
    ("parts", "order", "message"),
    [
        ((), None, "parts must be at least one tensor, got none"),
        (
            (torch.zeros(2, 3), torch.zeros(2, 4)),
            None,
            r"\*\(3,\)\) torch.float32 on cpu, got",
        ),
        ((torch.zeros(2), torch.zeros(2).half()), None, r"got \(2,\) torch.float16 on cpu"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), None, "torch.float32 on meta"),
        ((torch.zeros(2), torch.zeros(3)), torch.arange(4), r"order must be \(5,\), got \(4,\)"),
    ],
)
def test_rejects(parts, order, message):
    with pytest.raises(ValueError, match=message):
        Stacked(parts, order)
