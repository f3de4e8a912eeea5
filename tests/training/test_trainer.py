import dataclasses
import inspect
from dataclasses import replace

import pytest
import torch
from training.tiny import equal, make_data, make_trainer, weights

from dbkernels.data.augment import mirror, shift
from dbkernels.models import AdaLNLayer
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import TrainerConfig


def outside(trainer, block):
    prefix = tuple(f"model.layers.{i}." for i in range(3) if i not in block.layers)
    return {k: v for k, v in weights(trainer).items() if k.startswith(prefix)}


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_a_step_leaves_the_other_blocks_layers_bitwise_unchanged(family):
    trainer = make_trainer(family, weight_decay=0.5)
    trainer.run()
    block = trainer.blocks[1]
    before, others = weights(trainer), outside(trainer, block)
    trainer.step_block(block)
    assert equal(outside(trainer, block), others)
    changed = {k for k, v in weights(trainer).items() if not torch.equal(v, before[k])}
    assert any(name.startswith("model.layers.1.") for name in changed)
    assert "model.patch.weight" in changed and "model.head.weight" in changed
    assert all(parameter.grad is None for parameter in trainer.blocks.parameters())


def test_a_step_on_one_block_builds_no_graph_of_another():
    trainer, ran = make_trainer(), []
    for index, layer in enumerate(trainer.blocks.model.layers):
        assert isinstance(layer, AdaLNLayer)
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    trainer.step_block(trainer.blocks[2])
    assert ran == [2]


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_copies_give_the_same_bits_in_any_order(family):
    results = []
    for order in ([0, 1, 2] * 3, [2, 2, 0, 1, 1, 0, 2, 0, 1], [1, 1, 1, 0, 0, 0, 2, 2, 2]):
        trainer = make_trainer(family, sharing="copies", decay="cosine", ema=0.9, warmup=1)
        for index in order:
            trainer.step_block(trainer.blocks[index])
        results.append((weights(trainer), trainer.tensors()["ema"]))
    for other in results[1:]:
        assert equal(other[0], results[0][0]) and equal(other[1], results[0][1])


def test_joint_blocks_depend_on_the_order():
    results = []
    for order in ([0, 1, 2], [2, 1, 0]):
        trainer = make_trainer(sharing="joint")
        for index in order:
            trainer.step_block(trainer.blocks[index])
        results.append(weights(trainer))
    assert not equal(*results)


def test_run_gives_every_block_its_steps_and_the_shared_groups_all():
    trainer = make_trainer(steps=3)
    trainer.run()
    assert {name: group.steps for name, group in trainer.groups.items()} == {
        "block0": 3,
        "block1": 3,
        "block2": 3,
        "shared": 9,
    }
    assert trainer.step == trainer.total_steps == 9


def test_shared_groups_warm_up_over_the_steps_of_all_blocks():
    trainer = make_trainer(steps=4, warmup=2, decay="cosine")
    rates = {"block0": [], "shared": []}
    for step in range(12):
        trainer.step_block(trainer.blocks[step % 3])
        for name in rates:
            rates[name].append(trainer.groups[name].optimizer.param_groups[0]["lr"])
    assert rates["block0"][0] == pytest.approx(1e-2 / 3)
    assert rates["shared"][0] == pytest.approx(1e-2 / 7)
    assert max(rates["shared"]) == pytest.approx(1e-2)
    assert rates["shared"][-1] < 1e-3


def test_same_seed_same_bits_other_seed_other_bits():
    results = []
    for seed in (0, 0, 1):
        trainer = make_trainer(seed=seed)
        trainer.run()
        results.append(weights(trainer))
    assert equal(results[0], results[1]) and not equal(results[0], results[2])


@pytest.mark.parametrize("family", ["vit", "dit"])
def test_accumulation_sees_the_same_samples_and_noise_and_gives_their_mean_gradient(family):
    def augment(batch, draw):
        return shift(mirror(batch, draw), draw, pixels=1)

    whole, pieces = (make_trainer(family, accumulate=n) for n in (1, 4))
    rows = []
    for trainer in (whole, pieces):
        trainer.augment = augment
        rows.append([trainer.step_block(trainer.blocks[index])["loss"] for index in (0, 1, 2, 1)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-4)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(pieces)[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_clipping_bounds_the_gradient_of_one_update(clip):
    trainer = make_trainer(clip=clip)
    row = trainer.step_block(trainer.blocks[0])
    moments = [
        state["exp_avg"]
        for name in ("block0", "shared")
        for state in trainer.groups[name].optimizer.state.values()
    ]
    # the first moment of Adam is a tenth of the gradient after one step
    norm = torch.stack([moment.norm() for moment in moments]).norm().item() * 10
    assert row["grad_norm"] > 1e-2
    assert norm == pytest.approx(clip or row["grad_norm"], rel=1e-3)


def test_autocast_computes_in_bfloat16_and_keeps_float32_parameters():
    seen = []
    trainer = make_trainer("dit", autocast=True)
    trainer.blocks.model.layers[0].modulation.register_forward_hook(
        lambda module, inputs, output: seen.append(output.dtype)
    )
    row = trainer.step_block(trainer.blocks[0])
    assert seen == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in trainer.blocks.parameters())
    assert row["loss"] > 0


def test_rows_tell_the_blocks_own_step():
    trainer = make_trainer()
    rows = [trainer.step_block(trainer.blocks[i]) for i in (2, 0, 2)]
    told = [(row["step"], row["block"], row["block_step"]) for row in rows]
    assert told == [(0, 2, 0), (1, 0, 0), (2, 2, 1)]
    assert set(rows[0]) == {"step", "block", "block_step", "loss", "grad_norm", "lr"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_before_the_update(value):
    def objective(blocks, block, batch, draw):
        return blocks.model.head.weight.sum() * value

    trainer = make_trainer(objective=objective, ema=0.9)
    before = weights(trainer)
    message = r"block 1 at its step 0 with sigma in \[0.170584, 0.531832\]; nothing was updated"
    with pytest.raises(FloatingPointError, match=message):
        trainer.step_block(trainer.blocks[1])
    assert equal(weights(trainer), before)
    assert trainer.step == trainer.groups["block1"].steps == 0
    assert all(p.grad is None for p in trainer.blocks.parameters())


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_restored_trainer_goes_on_with_the_same_bits(sharing, ema):
    settings = {"sharing": sharing, "ema": ema, "decay": "cosine", "warmup": 1}
    whole = make_trainer(**settings)
    whole.run()
    first, second = make_trainer(**settings), make_trainer(**settings)
    for _ in range(5):
        first.step_block(first.next_block())
    tensors = {g: {k: v.clone() for k, v in t.items()} for g, t in first.tensors().items()}
    second.restore(tensors, first.counters())
    second.run()
    for group, expected in whole.tensors().items():
        assert equal(second.tensors()[group], expected), group
    assert second.counters() == whole.counters()


def test_augmentation_is_told_the_draw_of_the_step():
    trainer, seen = make_trainer(), []

    def augment(batch, draw):
        seen.append(draw)
        return batch

    trainer.augment = augment
    for index in (0, 0, 1):
        trainer.step_block(trainer.blocks[index])
    assert [draw.step for draw in seen] == [0, 1, 0]
    assert seen[0].seed == seen[1].seed != seen[2].seed


def test_the_devices_share_of_a_step_counts_nothing():
    trainer = make_trainer()
    loss, norm = trainer.advance(trainer.blocks[1])
    assert loss.shape == norm.shape == () and loss > 0 and norm > 0
    assert trainer.step == 0 and not any(group.steps for group in trainer.groups.values())


def short_of_memory(fits):
    """An objective with room for so many samples, and the sizes and draws that it met."""
    inner, met = make_trainer().objective, []

    def objective(blocks, block, batch, draw):
        met.append((len(batch["label"]), draw))
        loss = inner(blocks, block, batch, draw)
        if len(batch["label"]) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return loss

    return objective, met


def test_out_of_memory_halves_the_micro_batch_and_keeps_the_batch_and_its_noise():
    objective, met = short_of_memory(fits=2)
    whole, halved = make_trainer(ema=0.9), make_trainer(ema=0.9, objective=objective)
    with pytest.warns(
        UserWarning, match="block 0 at its step 0 with batch 4 in micro-batches of 4"
    ):
        rows = [halved.step_block(halved.blocks[0])]
    rows += [halved.step_block(halved.blocks[index]) for index in (1, 0)]
    expected = [whole.step_block(whole.blocks[index]) for index in (0, 1, 0)]
    assert [row.pop("micro_batch", None) for row in rows] == [2, None, None]
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(halved)[name], value, rtol=1e-3, atol=1e-5)
    assert [size for size, _ in met] == [4, 2, 2, 2, 2, 2, 2]
    assert met[0][1] == met[1][1] == replace(met[2][1], sample=0) and met[2][1].sample == 2


def test_out_of_memory_in_a_later_piece_leaves_nothing_of_the_earlier_ones():
    pieces = make_trainer(accumulate=4)
    expected = pieces.step_block(pieces.blocks[0])
    inner, calls = pieces.objective, []

    def objective(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*arguments)

    halved = make_trainer(accumulate=2, objective=objective)
    with pytest.warns(UserWarning, match="they have 1 from now on"):
        row = halved.step_block(halved.blocks[0])
    assert row == {**expected, "micro_batch": 1}
    assert equal(weights(halved), weights(pieces))


def test_odd_micro_batches_weigh_each_sample_alike():
    objective, met = short_of_memory(fits=3)
    whole = make_trainer(batch_size=5)
    halved = make_trainer(batch_size=5, objective=objective)
    expected = whole.step_block(whole.blocks[0])
    with pytest.warns(UserWarning):
        row = halved.step_block(halved.blocks[0])
    assert [size for size, _ in met] == [5, 3, 2]
    assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)


def test_memory_that_does_not_suffice_for_half_stops_before_the_update():
    objective, _ = short_of_memory(fits=1)
    trainer = make_trainer(objective=objective)
    before = weights(trainer)
    message = "block 2 at its step 0 with batch 4 in micro-batches of 2, halved in this step"
    with pytest.warns(UserWarning), pytest.raises(torch.OutOfMemoryError, match=message):
        trainer.step_block(trainer.blocks[2])
    assert equal(weights(trainer), before) and trainer.step == 0
    assert all(parameter.grad is None for parameter in trainer.blocks.parameters())


def test_a_restored_trainer_keeps_the_micro_batch_and_the_steps_per_swap_it_found():
    objective, _ = short_of_memory(fits=2)
    settings = {"offload": "cpu", "steps_per_swap": 0, "steps": 9}
    first, second = (make_trainer(objective=objective, **settings) for _ in range(2))
    with pytest.warns(UserWarning):
        rows = [first.step_block(first.next_block()) for _ in range(7)]
    lengths = [row.pop("steps_per_swap", None) for row in rows]
    assert (
        lengths == [None] * 4 + [first.block_order.steps_per_swap] + [None] * 2 and lengths[4] >= 5
    )
    tensors = {g: {k: v.clone() for k, v in t.items()} for g, t in first.tensors().items()}
    second.restore(tensors, first.counters())
    for trainer in (first, second):
        trainer.run()
    assert equal(weights(first), weights(second)) and first.counters() == second.counters()
    assert second.counters()["micro_batch"] == 2


def test_without_offload_the_blocks_are_on_the_device():
    with pytest.raises(ValueError, match=r"blocks must be on meta where offload is none, got cpu"):
        Trainer(make_trainer().blocks, make_data(), steps=1, device="meta")


def test_settings_are_those_of_the_configuration_with_its_defaults():
    signature = inspect.signature(Trainer.__init__).parameters
    for field in dataclasses.fields(TrainerConfig):
        assert signature[field.name].kind is inspect.Parameter.KEYWORD_ONLY
        expected = inspect.Parameter.empty if field.name == "steps" else field.default
        assert signature[field.name].default == expected, field.name
    changed = {"steps": 3, "batch_size": 2, "lr": 0.5, "warmup": 1, "decay": "cosine"}
    changed |= {"weight_decay": 0.25, "clip": 0.0, "ema": 0.5, "optimizer_in_backward": True}
    changed |= {"autocast": True, "order": "sequential", "steps_per_swap": 2, "offload": "cpu"}
    changed |= {"prefetch": True, "seed": 7}
    trainer = Trainer(make_trainer().blocks, make_data(), **changed)
    assert trainer.config == TrainerConfig(**changed)


@pytest.mark.parametrize("error", [ValueError("no such image"), KeyboardInterrupt()])
def test_a_step_that_was_cut_short_adds_nothing_to_the_next(error):
    inner, calls = make_trainer().objective, []

    def objective(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise error
        return inner(*arguments)

    whole, broken = make_trainer(accumulate=4), make_trainer(accumulate=4, objective=objective)
    with pytest.raises(type(error)):
        broken.step_block(broken.blocks[0])
    for index in (1, 0):
        assert broken.step_block(broken.blocks[index]) == whole.step_block(whole.blocks[index])
    assert equal(weights(broken), weights(whole))
