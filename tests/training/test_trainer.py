import dataclasses
import inspect
import math
from dataclasses import replace

import pytest
import torch
from implementations import implementations
from training.tiny import (
    CONFIGS,
    CPU,
    IN_BACKWARD,
    NO_ROOM,
    PREFETCH,
    assert_holds,
    assert_same,
    assert_same_steps,
    augment,
    copies,
    equal,
    families,
    make_data,
    make_trainer,
    short_of_memory,
    steps,
    weights,
)

from dbkernels.ops import use_implementation
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig

# a step


@families
def test_a_step_runs_one_blocks_layers_and_leaves_all_others_bitwise_unchanged(family):
    trainer, ran = make_trainer(family, weight_decay=0.5), []
    trainer.run()
    for index, layer in enumerate(trainer.blocks.model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    before = weights(trainer)
    steps(trainer, [1])
    changed = {k for k, v in weights(trainer).items() if not torch.equal(v, before[k])}
    layers = {name for name in changed if name.startswith("model.layers.")}
    assert ran == [1] and layers
    assert all(name.startswith("model.layers.1.") for name in layers)
    noisy_text = "clean_table", "head.linear"
    ends = {"mdm": ("table", "head"), "ar": noisy_text, "huginn": noisy_text}
    shared = ends.get(family, ("patch", "head"))
    assert {f"model.{name}.weight" for name in shared} <= changed
    assert all(parameter.grad is None for parameter in trainer.blocks.parameters())


@families
def test_copies_give_the_same_bits_in_any_order(family):
    results = []
    for order in ([0, 1, 2] * 3, [2, 2, 0, 1, 1, 0, 2, 0, 1], [1, 1, 1, 0, 0, 0, 2, 2, 2]):
        trainer = make_trainer(family, sharing="copies", decay="cosine", ema=0.9, warmup=1)
        steps(trainer, order)
        results.append(trainer)
    for other in results[1:]:
        assert_same(other, results[0])


@families
def test_the_loss_curve_is_that_of_plain_torch_on_every_implementation(family):
    curves, ops = {}, ["adaln_norm_fwd", "add_noise_fwd"]
    if "token" in CONFIGS[family].fields():
        ops += ["softmax_gradient", "table_rows_fwd"]
    for name in set.intersection(*({*implementations(op)} for op in ops)):
        with use_implementation(name):
            curves[name] = [row["loss"] for row in steps(make_trainer(family), (0, 0))]
        assert len(set(curves[name])) == 2
    for name, losses in curves.items():
        assert losses == pytest.approx(curves["torch"], rel=1e-4), name


def test_a_run_gives_every_block_its_steps_and_the_bits_of_its_seed():
    results = []
    for seed in (0, 0, 1):
        trainer = make_trainer(steps=3, seed=seed)
        trainer.run()
        results.append(weights(trainer))
        counts = {name: group.steps for name, group in trainer.groups.items()}
        assert counts == {"block0": 3, "block1": 3, "block2": 3, "shared": 9}
        assert trainer.step == trainer.total_steps == 9
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


def test_the_row_of_each_step_is_handed_on_in_turn():
    rows, other = [], make_trainer(steps=2)
    make_trainer(steps=2).run(on_row=rows.append)
    assert rows == [other.step_block(other.next_block()) for _ in range(other.total_steps)]


def test_shared_groups_warm_up_over_the_steps_of_all_blocks():
    trainer = make_trainer(steps=4, warmup=2, decay="cosine")
    rates = {"block0": [], "shared": []}
    for step in range(12):
        steps(trainer, [step % 3])
        for name in rates:
            rates[name].append(trainer.groups[name].optimizers[0].param_groups[0]["lr"])
    assert rates["block0"][0] == pytest.approx(1e-2 / 3)
    assert rates["shared"][0] == pytest.approx(1e-2 / 7)
    assert max(rates["shared"]) == pytest.approx(1e-2)
    assert rates["shared"][-1] < 1e-3


def assert_near(trainer, other):
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(trainer)[name], value, rtol=1e-3, atol=1e-5)


@families
def test_accumulation_sees_the_same_samples_and_noise_and_gives_their_mean_gradient(family):
    whole, pieces = (make_trainer(family, accumulate=n) for n in (1, 4))
    whole.augment = pieces.augment = augment
    for row, expected in zip(steps(pieces, (0, 1, 2, 1)), steps(whole, (0, 1, 2, 1)), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert_near(pieces, whole)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_clipping_bounds_the_gradient_of_one_update(clip):
    trainer = make_trainer(clip=clip)
    (row,) = steps(trainer, [0])
    moments = [
        state["exp_avg"]
        for name in ("block0", "shared")
        for state in trainer.groups[name].optimizers[0].state.values()
    ]
    # the first moment of Adam is a tenth of the gradient after one step
    norm = torch.stack([moment.norm() for moment in moments]).norm().item() * 10
    assert row["grad_norm"] > 1e-2
    assert norm == pytest.approx(clip or row["grad_norm"], rel=1e-3)


def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters():
    seen, trainer = [], make_trainer("dit", autocast=True)
    trainer.blocks.model.layers[0].modulation.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    (row,) = steps(trainer, [0])
    assert seen == [torch.bfloat16] and row["loss"] > 0
    assert all(p.dtype == torch.float32 for p in trainer.blocks.parameters())


def test_rows_tell_the_blocks_own_step():
    rows = steps(make_trainer(), (2, 0, 2))
    told = [(row["step"], row["block"], row["block_step"]) for row in rows]
    assert told == [(0, 2, 0), (1, 0, 0), (2, 2, 1)]
    assert set(rows[0]) == {"step", "block", "block_step", "loss", "grad_norm", "lr"}


def test_the_devices_share_of_a_step_counts_nothing():
    trainer = make_trainer()
    loss, norm = trainer.advance(trainer.blocks[1])
    assert loss.shape == norm.shape == () and loss > 0 and norm > 0
    assert trainer.step == 0 and not any(group.steps for group in trainer.groups.values())


# steps that fail


@pytest.mark.parametrize("error", [ValueError("no such image"), KeyboardInterrupt()])
def test_a_step_that_was_cut_short_adds_nothing_to_the_next(error):
    calls = []

    def objective(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return DiffusionBlocks.loss(*arguments)

    whole, broken = make_trainer(accumulate=4), make_trainer(accumulate=4, objective=objective)
    with pytest.raises(type(error)):
        steps(broken, [0])
    assert_same_steps(broken, whole, (1, 0))


# of a finite loss whose gradient is not, and of a loss that is not
NOT_FINITE = {
    "gradient": lambda w: (w * 0).sqrt().sum() * 0,
    "infinite gradient": lambda w: (w * 0).sum().sqrt(),
    "loss": lambda w: w.sum() + torch.inf,
    "loss that is NaN": lambda w: w.sum() + torch.nan,
    "loss and gradient": lambda w: w.sum() * torch.nan,
}
SETTINGS = [{}, {"clip": 0.0}, {"accumulate": 2}, IN_BACKWARD]


@pytest.mark.parametrize(
    "settings, name",
    # in the backward, a finite loss lets parameters move
    [(s, name) for s in SETTINGS for name in NOT_FINITE if s != IN_BACKWARD or "loss" in name],
)
def test_a_step_that_is_not_finite_is_refused_and_moves_nothing(settings, name):
    def objective(blocks, block, batch, draw):
        return NOT_FINITE[name](blocks.model.head.weight)

    trainer = make_trainer(objective=objective, ema=0.9, **settings)
    before, counters = copies(trainer), trainer.counters()
    message = r"the loss must be finite, .* in block 1 at its step 0 with sigma in \[0.170584, "
    with pytest.raises(FloatingPointError, match=message + r"0.531832\]; nothing was updated"):
        steps(trainer, [1])
    assert_holds(trainer, before)
    assert trainer.counters() == counters
    assert all(parameter.grad is None for parameter in trainer.blocks.parameters())


def test_in_the_backward_nothing_moves_from_a_gradient_on_that_is_not_finite():
    zero = torch.zeros(3, requires_grad=True)

    def objective(blocks, block, batch, draw):
        last, head = blocks.model.patch.bias, blocks.model.head
        # the backward meets the parameters of the last summand first
        loss = last.sum() + (head.weight.sum() * 0 + zero).sqrt().sum() * 0
        return loss + head.bias.sum()

    trainer = make_trainer(objective=objective, ema=0.9, **IN_BACKWARD)
    before = copies(trainer)
    with pytest.raises(FloatingPointError, match="; parameters with earlier gradients were upd"):
        steps(trainer, [0])
    after = copies(trainer)
    moved = [k for k, v in after["model"].items() if not torch.equal(v, before["model"][k])]
    assert moved == ["model.head.bias"] and equal(after["ema"], before["ema"])


@pytest.mark.parametrize(
    "batch_size, fits, sizes", [(4, 2, [4, 2, 2, 2, 2, 2, 2]), (5, 3, [5, 3, 2, 3, 2, 3, 2])]
)
@pytest.mark.parametrize("fail", NO_ROOM)
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch_and_its_noise(
    batch_size, fits, sizes, fail
):
    objective, met = short_of_memory(fits, fail)
    settings = {"batch_size": batch_size, "ema": 0.9}
    whole, halved = make_trainer(**settings), make_trainer(objective=objective, **settings)
    expected, size = steps(whole, (0, 1, 0)), f"with batch {batch_size} in micro-batches of "
    message = f"^out of memory in block 0 at its step 0 {size}{batch_size}: they have {fits} from"
    with pytest.warns(UserWarning, match=f"{message} now on$") as told:
        rows = steps(halved, (0, 1, 0))
    assert len(told) == 1
    assert [row.pop("micro_batch", None) for row in rows] == [fits, None, None]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert_near(halved, whole)
    assert [(size, alive) for size, _, alive in met] == [(size, 0) for size in sizes]
    assert met[0][1] == met[1][1] == replace(met[2][1], sample=0) and met[2][1].sample == fits


def test_another_error_halves_nothing():
    def objective(*arguments):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    trainer = make_trainer(objective=objective)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        steps(trainer, [0])
    assert trainer.micro_batch.size == 4


def test_out_of_memory_in_a_later_piece_leaves_nothing_of_the_earlier_ones():
    pieces, calls = make_trainer(accumulate=4), []
    (expected,) = steps(pieces, [0])

    def objective(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return DiffusionBlocks.loss(*arguments)

    halved = make_trainer(accumulate=2, objective=objective)
    with pytest.warns(UserWarning, match="they have 1 from now on"):
        assert steps(halved, [0]) == [{**expected, "micro_batch": 1}]
    assert equal(weights(halved), weights(pieces))


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize(
    "settings, fits, sizes, message",
    [
        ({}, 1, [4, 2], "with batch 4 in micro-batches of 2, halved in this step already"),
        ({"accumulate": 4}, 0, [1], "with batch 4 in micro-batches of 1, which cannot be halved"),
        # gradients that are gone cannot be added up
        (IN_BACKWARD, 3, [4], "with batch 4 in micro-batches of 4, which cannot be halved"),
    ],
)
def test_memory_that_does_not_suffice_stops_before_the_update(settings, fits, sizes, message):
    objective, met = short_of_memory(fits)
    trainer = make_trainer(objective=objective, **settings)
    before = copies(trainer)
    with pytest.raises(
        torch.OutOfMemoryError, match=f"^out of memory in block 2 at its step 0 {message}"
    ):
        steps(trainer, [2])
    assert_holds(trainer, before)
    assert trainer.step == 0 and [size for size, *_ in met] == sizes
    assert trainer.micro_batch.size == sizes[-1]
    assert all(parameter.grad is None for parameter in trainer.blocks.parameters())


# checkpoints


@pytest.mark.filterwarnings("ignore:out of memory")
@pytest.mark.parametrize(
    "settings, fits, first_steps, second_steps",
    [
        ({"decay": "cosine", "warmup": 1}, 4, 5, 3),
        ({"decay": "cosine", "warmup": 1, "ema": 0.9}, 4, 5, 3),
        ({"sharing": "copies", "ema": 0.9}, 4, 5, 0),
        # what was found out on the way
        ({**CPU, "steps_per_swap": 0, "steps": 9}, 2, 7, 0),
        # in the middle of a turn, and where any block may have been prefetched
        ({**PREFETCH, "ema": 0.9, "steps_per_swap": 3}, 4, 5, 4),
        *(({**PREFETCH, "ema": 0.9}, 4, 3, count) for count in (6, 7, 8)),
    ],
)
def test_a_restored_trainer_goes_on_with_the_same_bits(settings, fits, first_steps, second_steps):
    first, second = (make_trainer(objective=short_of_memory(fits)[0], **settings) for _ in "ab")
    rows = [first.step_block(first.next_block()) for _ in range(first_steps)]
    for _ in range(second_steps):
        second.step_block(second.next_block())
    # updates nothing until it is restored
    second.objective = lambda *arguments: first.objective(*arguments) + torch.inf
    second.launch(second.next_block())
    second.objective = first.objective
    second.restore(copies(first), first.counters())
    if fits == 2:
        found = first.block_order.steps_per_swap
        told = [row.get("steps_per_swap") for row in rows]
        assert told == [None] * 4 + [found] + [None] * 2 and found >= 5
        assert second.counters()["micro_batch"] == 2
    assert_same_steps(second, first)


def test_a_batch_that_was_cut_is_not_gone_on_with_in_the_backward():
    after, inside = make_trainer(clip=0.0), make_trainer(**IN_BACKWARD)
    before = copies(inside)
    counters = {**after.counters(), "micro_batch": 2}
    with pytest.raises(ValueError, match="of 4 are cut into micro-batches of 2, got True"):
        inside.restore(after.tensors(), counters)
    assert_holds(inside, before)
    assert inside.micro_batch.size == 4


# settings


def test_settings_are_those_of_the_configuration_with_its_defaults():
    signature = inspect.signature(Trainer.__init__).parameters
    for field in dataclasses.fields(TrainerConfig):
        assert signature[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        expected = inspect.Parameter.empty if field.name == "steps" else field.default
        assert signature[field.name].default == expected, field.name
    changed = {"steps": 3, "batch_size": 2, "lr": 0.5, "warmup": 1, "decay": "cosine"}
    changed |= {"weight_decay": 0.25, "ema": 0.5, "autocast": True, "order": "sequential"}
    changed |= {"steps_per_swap": 2, "seed": 7, **IN_BACKWARD, **PREFETCH}
    trainer = Trainer(make_trainer().blocks, make_data(), **changed)
    assert trainer.config == TrainerConfig(**changed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "meta"}, "blocks must be on meta where offload is none, got cpu"),
        ({"cuda_graphs": True}, "cuda_graphs must be run on an NVIDIA GPU, got device cpu"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"steps": "3"}, "steps must be a whole number, got '3'"),
        ({"steps": 2.5}, "steps must be a whole number, got 2.5"),
        ({"warmup": True}, "warmup must be a whole number, got True"),
        ({"lr": "1e-3"}, "lr must be a number, got '1e-3'"),
        ({"decay": "cosin"}, "decay must be one of constant, cosine, got cosin"),
        ({"order": "shufled"}, "order must be one of shuffled, sequential, got shufled"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"accumulate": 0}, "accumulate must be at least 1, got 0"),
        ({"accumulate": 3}, "accumulate must divide the batch size 4, got 3"),
        ({"lr": 0.0}, "lr must be positive and finite, got 0.0"),
        ({"lr": math.nan}, "lr must be positive and finite, got nan"),
        ({"lr": math.inf}, "lr must be positive and finite, got inf"),
        ({"clip": math.nan}, "clip must be at least 0, got nan"),
        ({"warmup": 2**31}, f"warmup must be at most {2**31 - 1}, got {2**31}"),
        ({"warmup": -1}, "warmup must be at least 0, got -1"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"clip": -1.0}, "clip must be at least 0, got -1.0"),
        ({"ema": 1.0}, r"ema must be in \[0, 1\), got 1.0"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"seed": 2**63}, f"seed must be at most {2**63 - 1}, got {2**63}"),
        ({"steps_per_swap": -1}, "steps_per_swap must be at least 0, got -1"),
        ({"offload": "some"}, "offload must be one of none, cpu, disk, got some"),
        ({"prefetch": True}, "offload must be cpu or disk for prefetch, got none"),
        ({"offload_dir": "x"}, "offload_dir must name a directory .* disk alone, got x"),
        ({"offload": "disk"}, "offload_dir must name a directory .* disk alone, got none"),
        ({**CPU, "offload_dir": "x"}, "offload_dir must name a directory .* disk alone, got x"),
        (
            {"offload_activations": True, "cuda_graphs": True},
            "cuda_graphs must be False with offload_act.*, got True",
        ),
        ({**IN_BACKWARD, "clip": 1.0}, "clip must be 0 with optimizer_in_backward: .*, got 1.0"),
        ({**IN_BACKWARD, "accumulate": 2}, "accumulate must be 1 with optimizer_in_ba.*, got 2"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        Trainer(make_trainer().blocks, make_data(), **{"steps": 1, "batch_size": 4, **settings})
