"""Optimizers of every kind: steps are those of torch's own loop, and a run goes on to the bit."""

import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, AdamW, Muon, NAdam, Optimizer, RMSprop
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LinearLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from training.tiny import CONFIGS, VIT, assert_same, families, make_data
from training.wrapped import WrappedMomentum

from dbkernels.models import family_named
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.optimizers.decay import on_matrices
from dbkernels.training.optimizers.kind import Trained, skips
from dbkernels.training.optimizers.muon import MuonAndAdamW
from dbkernels.training.optimizers.registry import OPTIMIZERS
from dbkernels.training.optimizers.schedule import rates_of
from dbkernels.training.optimizers.trial import tried
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

NEEDS = {"adamw8bit": "torchao", "adamw4bit": "torchao"}
CPU = torch.device("cpu")
named = pytest.mark.parametrize("name", OPTIMIZERS)
# enough numbers in a matrix for torchao to keep its moments in few bits
WIDE = replace(VIT, dim=64, num_heads=2, mlp_hidden=128, cond_dim=32)


def require(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])


class Counting(Optimizer):
    """Momentum whose share grows with a number in the parameter group, as schedule-free has one."""

    def __init__(self, groups, lr=1e-3, lazy=True):
        super().__init__(groups, {"lr": lr, "k": 0, "weight_sum": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            group["weight_sum"] += group["lr"] ** 2
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["z"] = torch.clone(p)
                state["z"].sub_(p.grad, alpha=group["lr"])
                p.lerp_(state["z"], 1 / (group["k"] + 1))


class Mean(Optimizer):
    """Steps by the mean of all gradients, whose number it counts in its state."""

    def __init__(self, groups, lr=1e-3):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, mean=torch.zeros_like(p), unused=None)
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 / state["step"])
                p.sub_(state["mean"], alpha=group["lr"])


class Later(Mean):
    """A number of its groups is there from the first step on, and another moves after many."""

    def __init__(self, groups, lr=1e-3):
        super().__init__(groups, lr)
        for group in self.param_groups:
            group["scale"] = 1.0

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["taken"] = group.get("taken", 0) + 1
            if group["taken"] == 8:
                group["scale"] = 0.5
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] * group["scale"])


FACTORIES = {
    "sgd": partial(SGD, momentum=0.9),
    "plain sgd": SGD,
    "adamw": AdamW,
    "fused adamw": partial(AdamW, fused=True),
    "rmsprop": partial(RMSprop, momentum=0.5, centered=True),
    "adafactor": Adafactor,
    "nadam": NAdam,
    "counting": Counting,
    "mean": Mean,
    "later": Later,
    "wrapped": WrappedMomentum,
}
every_factory = pytest.mark.parametrize("factory", FACTORIES.values(), ids=FACTORIES)


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def make_group(kind, shapes=((64, 72), (9,)), *, names=("layers.0.w", "b"), **settings):
    torch.manual_seed(2)
    parameters = {n: nn.Parameter(torch.randn(s)) for n, s in zip(names, shapes, strict=True)}
    config = TrainerConfig(steps=8, **{"weight_decay": 0.1, **settings})
    return ParamGroup(parameters, config, total=8, kind=kind)


def steps_of(group, count=4, finite=lambda step: True):
    torch.manual_seed(3)
    for step in range(count):
        group.prepare(0.01 * (step + 1))
        for parameter in group.parameters.values():
            parameter.grad = torch.randn_like(parameter)
        group.update(torch.tensor(finite(step)))
    return {name: p.detach().clone() for name, p in group.parameters.items()}


def in_torchs_loop(made, group, count=4, finite=lambda step: True):
    """The same steps with optimizers that make their state when they please."""
    torch.manual_seed(2)
    parameters = {n: nn.Parameter(torch.randn(p.shape)) for n, p in group.parameters.items()}
    optimizers = made(parameters)
    torch.manual_seed(3)
    for step in range(count):
        for parameter in parameters.values():
            parameter.grad = torch.randn_like(parameter)
        for optimizer in optimizers if finite(step) else ():
            for each in optimizer.param_groups:
                each["lr"] = float(torch.tensor(0.01 * (step + 1)))
            optimizer.step()
    return {name: p.detach() for name, p in parameters.items()}


@pytest.mark.parametrize("finite", [lambda step: True, lambda step: step != 1])
@every_factory
def test_steps_are_those_of_torchs_loop_and_none_is_taken_that_may_not_be(factory, finite):
    group = make_group(tried(factory, CPU))
    found = steps_of(group, finite=finite)

    def made(parameters):
        return [factory([{"params": [*parameters.values()], "weight_decay": 0.1}])]

    assert_equal(found, in_torchs_loop(made, group, finite=finite))


@pytest.mark.parametrize("finite", [lambda step: True, lambda step: step != 1])
def test_muon_steps_matrices_of_layers_and_adamw_the_rest(finite):
    shapes = (8, 12), (8, 12), (9,)
    group = make_group(MuonAndAdamW(), shapes, names=("layers.0.w", "head.w", "layers.0.b"))
    found = steps_of(group, finite=finite)

    def made(parameters):
        matrix, *others = parameters.values()
        muon = Muon([matrix], weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
        return [AdamW(others, weight_decay=0.1, fused=True), muon]

    assert_equal(found, in_torchs_loop(made, group, finite=finite))
    first, second = group.optimizers
    assert type(first) is AdamW and isinstance(second, Muon)


@pytest.mark.parametrize("finite", [lambda step: True, lambda step: step != 1])
@pytest.mark.parametrize("name", NEEDS)
def test_adamw_of_few_bits_steps_as_torchao_does(name, finite):
    optim = pytest.importorskip("torchao.optim")
    kind = {"adamw8bit": optim.AdamW8bit, "adamw4bit": optim.AdamW4bit}[name]
    group = make_group(OPTIMIZERS[name])
    found = steps_of(group, finite=finite)

    class WithATensorAsRate(kind):
        def step(self):
            for each in self.param_groups:
                each["lr"] = torch.tensor(each["lr"])
            with torch.compiler.set_stance("force_eager"):
                super().step()

    def made(parameters):
        return [WithATensorAsRate(parameters.values(), weight_decay=0.1)]

    assert_equal(found, in_torchs_loop(made, group, finite=finite))


@named
def test_a_step_that_is_not_finite_leaves_every_bit_where_it_was(name):
    require(name)
    group = make_group(OPTIMIZERS[name], ema=0.5)
    steps_of(group)
    before = [tensor.clone() for tensor in group.tensors()]
    for parameter in group.parameters.values():
        parameter.grad = torch.full_like(parameter, torch.nan)
    group.prepare(0.1)
    group.update(torch.tensor(False))
    assert all(map(torch.equal, group.tensors(), before))
    assert all(parameter.grad is None for parameter in group.parameters.values())


@named
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_in_the_backward_and_after_it_give_the_same_bits(name, offload):
    require(name)
    after, inside = (
        make_trainer(steps=1, optimizer=name, offload=offload, model=WIDE, clip=0.0, **settings)
        for settings in ({}, {"optimizer_in_backward": True})
    )
    for trainer in (after, inside):
        trainer.run()
    assert_same(inside, after)


def test_moments_of_8_bits_have_shapes_before_there_are_numbers():
    eight = pytest.importorskip("torchao.optim.subclass_8bit")
    for table in (eight.get_qmap_signed, eight.get_qmap_unsigned):
        table.cache_clear()
    with torch.device("meta"):
        group = make_group(OPTIMIZERS["adamw8bit"])
    assert {tensor.device.type for tensor in group.optimizer_tensors().values()} == {"meta"}


@named
def test_state_is_whole_from_the_start_and_stays_the_same_tensors(name):
    require(name)
    group = make_group(OPTIMIZERS[name], ema=0.5)
    before = {key: id(tensor) for key, tensor in group.optimizer_tensors().items()}
    assert len({*before.values()}) == len(before) >= 3
    steps_of(group)
    assert {key: id(tensor) for key, tensor in group.optimizer_tensors().items()} == before
    assert all(type(tensor) is torch.Tensor for tensor in group.tensors()[2:])


@named
@pytest.mark.parametrize("offload", ["none", "cpu", "disk"])
def test_a_run_goes_on_to_the_same_bits(name, offload, make_config, train, tmp_path):
    require(name)
    place = str(tmp_path / "blocks") if offload == "disk" else ""
    config = make_config(optimizer=name, offload=offload, offload_dir=place, ema=0.5)
    config = replace(config, model=WIDE)
    train = partial(train, threads=1)
    whole = train(config, "whole", save_every=0)
    train(replace(config, trainer=replace(config.trainer, steps=2)), save_every=2)
    assert_same(train(config, resume="latest"), whole)
    plain = replace(config, trainer=replace(config.trainer, offload="none", offload_dir=""))
    assert_same(train(plain, "plain"), whole)
    other = "muon" if name == "adamw" else "adamw"
    with pytest.raises(ValueError):
        train(replace(config, trainer=replace(config.trainer, optimizer=other)), resume="latest")


def make_trainer(steps=3, model=VIT, **settings):
    torch.manual_seed(1)
    blocks = DiffusionBlocks(family_named("vit").model(model), 3)
    told = {"steps": steps, "batch_size": 4, "lr": 1e-2, **settings}
    return Trainer(blocks, make_data(), **told)


@every_factory
@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_an_optimizer_of_ones_own_goes_on_to_the_same_bits(factory, offload):
    whole = make_trainer(make_optimizer=factory)
    whole.run()
    first = make_trainer(make_optimizer=factory, offload=offload)
    for _ in range(4):
        first.step_block(first.next_block())
    first.offloader.settle()
    tensors = {k: {n: t.clone() for n, t in v.items()} for k, v in first.tensors().items()}
    second = make_trainer(make_optimizer=factory, offload=offload)
    second.restore(tensors, first.counters())
    second.run()
    assert_same(second, whole)


def test_a_run_without_weight_decay_on_biases_differs_in_those_alone():
    """Of one step, before anything else has moved."""
    found = {}
    for decay_on in ("matrices", "all"):
        trainer = make_trainer(steps=1, decay_on=decay_on, weight_decay=0.5)
        with torch.no_grad():
            for parameter in trainer.blocks.parameters():
                parameter.add_(1)
        trainer.step_block(trainer.blocks[0])
        found[decay_on] = dict(trainer.blocks.named_parameters())
    moved = {n for n, p in found["all"].items() if not torch.equal(p, found["matrices"][n])}
    assert moved
    decays = on_matrices(trainer.blocks)
    assert not any(decays(name, p) for name, p in found["all"].items() if name in moved)
    assert {name.rpartition(".")[2] for name in moved} >= {"bias", "positions"}


@families
def test_no_norm_bias_table_or_position_decays(family):
    model = family_named(family).model(CONFIGS[family])
    blocks = DiffusionBlocks(model, 3)
    decays, named = on_matrices(blocks), dict(blocks.named_parameters())
    found = {name for name, p in named.items() if decays(name, p)}
    for name in named.keys() - found:
        kind = type(blocks.get_submodule(name.rpartition(".")[0]))
        assert named[name].dim() == 1 or kind is nn.Embedding or name.endswith("positions"), name
    assert {"model.layers.0.modulation.weight"} & found or family == "mmdit"
    assert not any("table" in name or "norm" in name for name in found)


def test_a_rule_of_ones_own_says_what_decays():
    trainer = make_trainer(decays=lambda name, p: name.endswith("fc1.weight"), weight_decay=0.3)
    for group in trainer.groups.values():
        for each in group.optimizers[0].param_groups:
            names = {n for n, p in group.parameters.items() if any(p is t for t in each["params"])}
            assert all(n.endswith("fc1.weight") == (each["weight_decay"] > 0) for n in names)


# schedules


def warm_cosine(optimizer, total):
    parts = [LinearLR(optimizer, 0.1, total_iters=2), CosineAnnealingLR(optimizer, total - 2)]
    return SequentialLR(optimizer, parts, milestones=[2])


SCHEDULES = {
    "warm cosine": warm_cosine,
    "one cycle": lambda o, n: OneCycleLR(o, 0.3, total_steps=n, cycle_momentum=False),
}


@pytest.mark.filterwarnings("ignore:.*call `optimizer.step")
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_rates_are_those_of_torchs_scheduler_in_its_own_loop(schedule):
    optimizer = SGD([torch.zeros((), requires_grad=True)], lr=0.05)
    scheduler, expected = schedule(optimizer, 6), []
    for step in range(6):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        if step < 5:
            scheduler.step()
    assert rates_of(schedule, 6, 0.05) == expected


def test_a_schedule_gives_each_group_its_rates_and_a_run_goes_on():
    rows = []
    trainer = make_trainer(schedule=warm_cosine, steps=4)
    while trainer.step < trainer.total_steps:
        rows.append(trainer.step_block(trainer.next_block()))
    expected = rates_of(warm_cosine, 4, 1e-2)
    for block in range(3):
        assert [row["lr"] for row in rows if row["block"] == block] == expected
    # what all blocks share has three times as many updates, and a schedule as long
    first = make_trainer(schedule=warm_cosine, steps=4)
    for _ in range(5):
        first.step_block(first.next_block())
    second = make_trainer(schedule=warm_cosine, steps=4)
    second.restore(first.tensors(), first.counters())
    second.run()
    assert_same(second, trainer)


# refusals


class Lazy(SGD):
    """Its first step is another than those after it."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and not self.state[p]:
                    p.grad.mul_(2)
        super().step()


class Replacing(Mean):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["sum"] = state.get("sum", 0) + p.grad
                    p.sub_(state["sum"], alpha=group["lr"])


class Late(Mean):
    """A part of its state is made in the second step."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and self.state[p]["step"] == 2:
                    self.state[p]["late"] = p.clone()


class Hiding(Mean):
    """It counts its steps where no checkpoint looks."""

    taken = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.taken += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad, alpha=group["lr"] / self.taken)


class Listing(SGD):
    def step(self, closure=None):
        super().step()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["history"] = [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lion"}, "optimizer must be one of adamw, muon, .*, got lion"),
        ({"decay_on": "biases"}, "decay_on must be one of matrices, all, got biases"),
        ({"make_optimizer": partial(Lazy, momentum=0.9)}, "Lazy must begin from a state that is"),
        ({"make_optimizer": Listing}, r"history in the state of Listing must be a tensor.*\[1\]"),
        ({"make_optimizer": Replacing}, "Replacing must keep its state in the tensors that it"),
        ({"make_optimizer": Late}, "Late must keep its state in the tensors that it"),
        ({"make_optimizer": Hiding}, "Hiding must go on from its state and the numbers of its"),
        ({"make_optimizer": lambda groups: None}, "must make a torch.optim.Optimizer, got a None"),
        ({"make_optimizer": lambda g: SGD(g[0]["params"][:1])}, "SGD must have every tensor of"),
        ({"make_optimizer": torch.optim.LBFGS}, "LBFGS must step without a closure"),
        (
            {"make_optimizer": SGD, "optimizer_in_backward": True, "clip": 0.0},
            "optimizer_in_backward must be False for SGD, which cannot be told on the device",
        ),
        ({"schedule": lambda o, n: None}, "schedule must make an LRScheduler of torch, got a None"),
        ({"schedule": lambda o, n: ReduceLROnPlateau(o)}, "ReduceLROnPlateau must step without"),
        (
            {"schedule": lambda o, n: OneCycleLR(o, 0.3, total_steps=n)},
            "OneCycleLR must move the rate alone",
        ),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        trainer = make_trainer(**settings)
        trainer.step_block(trainer.blocks[0])


def test_a_graph_of_a_step_needs_an_optimizer_that_can_be_captured():
    with pytest.raises(ValueError, match="cuda_graphs must be off for muon, got on"):
        make_group(OPTIMIZERS["muon"], cuda_graphs=True)


@pytest.mark.parametrize("name", NEEDS)
def test_a_missing_package_is_one_sentence(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(ValueError, match=rf"torchao must be installed for {name} \(pip install"):
        OPTIMIZERS[name].make([Trained("w", torch.zeros(2), 0.0)], captured=False)


def test_only_a_fused_optimizer_leaves_out_a_step_by_itself():
    w = [torch.zeros(2, requires_grad=True)]
    assert skips(AdamW(w, fused=True)) and not skips(AdamW(w)) and not skips(SGD(w))
