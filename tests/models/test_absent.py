"""Models of which some layers are in no memory: what is there is as in the whole model."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from models.tiny import CONFIGS, every_family, randomise
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.models import FAMILIES, add_adapters
from dbkernels.models.absent import (
    DrawingForAbsent,
    absent_copy,
    load,
    made_without,
    to_meta,
)

FIRST_AND_LAST = (0, 2)


class NewBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are made in memory, by their op."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.empty.memory_format and not made.is_meta:
            self.total += made.nbytes
        return made


def maker(family):
    return partial(FAMILIES[family].model, CONFIGS[family])


def made(family, absent=FIRST_AND_LAST):
    torch.manual_seed(3)
    return made_without(maker(family), lambda count: absent)


def whole(family):
    torch.manual_seed(3)
    return maker(family)()


def parameters(model):
    return dict(model.named_parameters())


def is_absent(name, absent=FIRST_AND_LAST):
    return any(name.startswith(f"layers.{index}.") for index in absent)


@every_family
@pytest.mark.parametrize("absent", [(), (1,), FIRST_AND_LAST, (0, 1, 2)], ids=str)
def test_what_is_there_has_the_bits_of_the_whole_model_and_the_rest_its_shapes(family, absent):
    expected, after = parameters(whole(family)), torch.random.get_rng_state()
    model = made(family, absent)
    assert torch.equal(torch.random.get_rng_state(), after)
    found = parameters(model)
    assert list(found) == list(expected)
    assert {name for name, p in found.items() if p.is_meta} == {
        name for name in expected if is_absent(name, absent)
    }
    for name, p in found.items():
        like = expected[name]
        assert (p.shape, p.dtype, p.requires_grad) == (like.shape, like.dtype, like.requires_grad)
        assert p.is_meta or torch.equal(p, like), name
    names = {name for name, _ in model.named_buffers()}
    assert names == {name for name, _ in whole(family).named_buffers()}


@every_family
def test_the_number_of_layers_is_told_before_one_is_made(family):
    told = []
    made_without(maker(family), lambda count: told.append(count) or ())
    assert told == [3]


def test_of_a_deep_model_no_more_than_one_absent_layer_is_in_memory_at_a_time():
    config, alive, most = replace(CONFIGS["dit"], depth=6), [], []

    def make():
        return FAMILIES["dit"].model(config)

    class Alive(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            made = func(*args, **(kwargs or {}))
            if func is torch.ops.aten.empty.memory_format and not made.is_meta:
                alive.append(
                    torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage())
                )
                most.append(sum(not each.expired() for each in alive))
            return made

    with Alive():
        made_without(make, lambda count: range(1, count))
    few = max(most)
    alive.clear(), most.clear()
    with Alive():
        layers = make().layers
    of_a_layer = len(list(layers[0].parameters()))
    assert max(most) - few >= 4 * of_a_layer


def test_nothing_that_was_patched_for_the_making_stays():
    made("vit")
    layers = nn.ModuleList([nn.Linear(2, 2)])
    assert not any(p.is_meta for p in layers.parameters())
    with pytest.raises(RuntimeError, match="no such model"):
        made_without(no_such_model, lambda count: (0,))
    assert not any(p.is_meta for p in nn.ModuleList([nn.Linear(2, 2)]).parameters())


def no_such_model():
    raise RuntimeError("no such model")


@pytest.mark.parametrize("family", ["vit", "dit", "mdm", "ar"])
def test_adapters_are_drawn_for_absent_layers_too(family):
    expected, model = whole(family), made(family)
    for each in (expected, model):
        torch.manual_seed(4)
        with DrawingForAbsent():
            add_adapters(each, rank=2)
    found, every = parameters(model), parameters(expected)
    assert list(found) == list(every) and sum("adapters" in name for name in found) > 3
    for name, p in found.items():
        assert p.is_meta == is_absent(name) and p.requires_grad == every[name].requires_grad, name
        assert p.is_meta or torch.equal(p, every[name]), name


def test_without_the_mode_absent_layers_take_no_numbers():
    drawn = []
    for context in (DrawingForAbsent(), torch.no_grad()):
        torch.manual_seed(0)
        with context:
            nn.init.normal_(torch.empty(5, dtype=torch.float32, device="meta"))
        drawn.append(torch.rand(1))
    torch.manual_seed(0)
    torch.randn(5)
    assert torch.equal(drawn[0], torch.rand(1)) and not torch.equal(*drawn)


def test_weights_of_the_whole_model_go_into_what_is_there():
    weights = randomise(whole("vit")).state_dict()
    model = made("vit")
    load(model, weights)
    for name, tensor in model.state_dict().items():
        assert tensor.is_meta if is_absent(name) else torch.equal(tensor, weights[name]), name


def without(name):
    return lambda weights: {k: v for k, v in weights.items() if k != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            without("layers.0.attention.qkv.weight"),
            "weights must have layers.0.attention.qkv.weight, got none",
        ),
        (
            without("layers.1.attention.qkv.weight"),
            "weights must be those of ViT, got layers.1.attention.qkv.weight",
        ),
        (lambda weights: weights | {"other": torch.ones(1)}, "those of ViT, got other"),
        (
            lambda weights: weights | {"layers.1.attention.qkv.weight": torch.ones(1)},
            "size mismatch",
        ),
    ],
)
def test_weights_of_another_model_are_refused(change, message):
    weights = whole("vit").state_dict()
    with pytest.raises(RuntimeError, match=message):
        load(made("vit"), change(weights))


def tied():
    """Two layers, of which the second one also has a weight of the first."""
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module[1].bias.requires_grad_(False)
    return module


def test_a_module_leaves_memory_but_for_what_it_has_in_common_with_others():
    module, kept = tied(), nn.Linear(3, 3)
    module.append(kept)
    bits = kept.weight.clone()
    to_meta(module, but=(kept,))
    assert [p.is_meta for p in module.parameters()] == [True, True, True, False, False]
    assert module[1].weight is module[0].weight
    assert [p.requires_grad for p in module.parameters()] == [True, True, False, True, True]
    assert module[2] is kept and torch.equal(kept.weight, bits)


def test_an_absent_copy_takes_no_memory_and_its_original_stays():
    module, kept = tied(), nn.Linear(300, 300)
    module.append(kept)
    before = [p.detach().clone() for p in module.parameters()]
    with NewBytes() as new:
        twin = absent_copy(module, (kept,))
    assert new.total == 0
    assert twin[2] is kept and twin[1].weight is twin[0].weight
    assert twin[0].weight is not module[0].weight
    assert [p.is_meta for p in twin.parameters()] == [True, True, True, False, False]
    assert all(map(torch.equal, before, module.parameters()))
