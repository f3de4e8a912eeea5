"""Each layer that `fuse` knows computes what the original does, and its gradients."""

import copy
import re
from collections import defaultdict
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
from accuracy import assert_as_accurate_as_eager, upstream_of
from convert.fused_cases import CASES, WIDE, Rotary, dit_block, lightning, vit
from convert.published import COND, D
from ops.one_layer import saved_bytes
from torch import nn

from dbkernels.convert import fuse, unfuse
from dbkernels.models.layer import AdaLNLayer
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import POLICIES

F64 = torch.float64
every_case = pytest.mark.parametrize("name", CASES)


def as_floats(value, change):
    """The value, changed where it is a tensor of floats."""
    is_floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return change(value) if is_floats else value


def results(module, given):
    """Outputs, and gradients by the names of the arguments and of the parameters."""
    given = [as_floats(t, lambda t: t.detach().clone().requires_grad_()) for t in given]
    named = {f"argument {i}": t for i, t in enumerate(given) if getattr(t, "requires_grad", 0)}
    named |= dict(module.named_parameters())
    torch.manual_seed(1)
    out = module(*given)
    outputs = [out] if isinstance(out, torch.Tensor) else [y for y in out if y is not None]
    grads = torch.autograd.grad(outputs, list(named.values()), upstream_of(outputs))
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return together(found | dict(zip(named, grads, strict=True)))


def together(found):
    """The gradients of queries', keys' and values' biases as one, for that of keys may be 0."""
    joined = {}
    for name, t in found.items():
        joined.setdefault(re.sub(r"_[qkv](_proj)?.bias$", "_qkv.bias", name), []).append(t)
    return {name: torch.cat(parts) for name, parts in joined.items()}


def fused(module, recompute="none"):
    holder = nn.ModuleList([copy.deepcopy(module)])
    report = fuse(holder, recompute)
    assert [each.path for each in report.replaced] == ["0"], str(report)
    return holder[0]


def doubled(module, given):
    given = [as_floats(t, torch.Tensor.double) for t in given]
    return copy.deepcopy(module).double(), [
        copy.deepcopy(t).double() if isinstance(t, nn.Module) else t for t in given
    ]


@contextmanager
def in_float64(module):
    """Without steps of a module that are float32 whatever it is given."""
    own = {}
    for name, norm in list(module.named_modules()):
        if type(norm).__name__ == "RMSNorm" and type(norm).__module__[:10] == "diffusers.":
            own[name] = norm
            plain = nn.RMSNorm(norm.weight.shape, eps=norm.eps)
            plain.weight = norm.weight
            module.set_submodule(name, plain)
    to_float = torch.Tensor.float
    with patch.object(torch.Tensor, "float", lambda t: t if t.dtype == F64 else to_float(t)):
        yield
    for name, norm in own.items():
        module.set_submodule(name, norm)


@every_case
def test_outputs_and_gradients_are_the_originals(name):
    module, given = CASES[name]()
    module64, given64 = doubled(module, given)
    with in_float64(module64):
        exact = results(module64, given64)
    eager = results(module, given)
    for recompute in POLICIES:
        found = results(fused(module64, recompute), given64)
        assert found.keys() == exact.keys()
        for key, expected in exact.items():
            error, size = (found[key] - expected).abs().max(), expected.abs().max()
            # a gradient of zeros, as that of queries which nothing reads, is one exactly
            assert error <= 1e-12 * size, f"{key} at {recompute}: {error:.1e} of {size:.1e}"
        for key, actual in results(fused(module, recompute), given).items():
            where = f"{key} at {recompute}"
            assert actual.dtype == eager[key].dtype
            assert_as_accurate_as_eager(where, actual, eager[key], exact[key])


NARROW = {"bfloat16": nullcontext, "autocast": partial(torch.autocast, "cpu", torch.bfloat16)}


@pytest.mark.parametrize("narrow", NARROW)
@pytest.mark.parametrize("made", [dit_block, lightning, vit])
def test_is_as_accurate_as_eager_in_bfloat16(made, narrow):
    errors = defaultdict(float)  # of several draws together, for those of one are a fluke
    for _ in range(8):
        module, given = made()
        if narrow == "bfloat16":
            module, given = module.bfloat16(), [as_floats(t, torch.Tensor.bfloat16) for t in given]
        exact = results(*doubled(module, given))
        with NARROW[narrow]():
            each = results(fused(module), given), results(module, given)
        for key, expected in exact.items():
            assert each[0][key].dtype == each[1][key].dtype, key
            for mine, found in zip((True, False), each, strict=True):
                errors[key, mine] += float((found[key].double() - expected).square().mean())
    for key in exact:
        assert errors[key, True] <= 4 * errors[key, False], key


@every_case
def test_names_objects_and_bits_are_the_originals(name):
    module, _ = CASES[name]()
    before, state = dict(module.named_parameters()), copy.deepcopy(module.state_dict())
    holder = nn.ModuleList([module])
    fuse(holder)
    layer = holder[0]
    assert layer is not module
    assert {key: id(p) for key, p in layer.named_parameters()} == {
        key: id(p) for key, p in before.items()
    }
    assert list(layer.state_dict()) == list(state)
    assert all(torch.equal(t, state[key]) for key, t in layer.state_dict().items())
    unfuse(holder)
    assert holder[0] is module
    assert all(torch.equal(t, state[key]) for key, t in module.state_dict().items())


@pytest.mark.parametrize("recompute", POLICIES)
@pytest.mark.parametrize("made", [dit_block, lightning, vit])
def test_keeps_what_a_layer_of_this_package_keeps(made, recompute):
    """Beside x and the parameters; no joined or permuted weight is kept."""
    module, (x, *given) = made()
    T = 49
    x = torch.randn(2, T, D, requires_grad=True)
    given = [t[:2] if isinstance(t, torch.Tensor) else Rotary(7, WIDE) for t in given]
    layer = fused(module, recompute)
    config = replace(layer.config, recompute=recompute, cond_dim=COND)
    like = AdaLNLayer(config)
    rotary = rotary_table(torch.arange(T), WIDE) if len(given) > 1 else None

    def kept(run, module):
        held = [x, *module.parameters(), *(t for t in given if isinstance(t, torch.Tensor))]
        return saved_bytes(run, but=held)

    mine = kept(lambda: layer(x, *given), layer)
    theirs = kept(lambda: like(x, torch.ones(2, COND), rotary), like)
    eager = kept(lambda: module(x, *given), module)
    modulation = 2 * 6 * D * 4
    assert mine <= theirs + modulation
    assert mine < eager
