"""Blocks that start from a network trained end to end: what they keep, learn from, and refuse."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training.tiny import CONFIGS, CPU, equal, families, make_data, weights

from dbkernels.diffusion.path import log_level
from dbkernels.models.denoiser import ImageDenoiser
from dbkernels.ops.philox import Draw
from dbkernels.training import checkpoint
from dbkernels.training.run import load_run
from dbkernels.training.run_config import PartitionConfig, StartConfig
from dbkernels.training.trained import Distillation, one_at_a_time, start_weights, trained_run

CONVENTIONAL = {"objective": "conventional", "partition": {"num_blocks": 1}}
SOURCE = Path("source")
DRAW = Draw(3, 1)


@pytest.fixture
def source(make_config, train):
    """Trains a network end to end; gives the configuration of a run that starts from it."""

    def make(family, *, without_noise=False, distill=0.0, **changes):
        how = CONVENTIONAL if without_noise else {"partition": {"num_blocks": 1}}
        config = make_config(family, steps=3, ema=0.5, lr=0.05, **how)
        train(config, SOURCE)
        start = StartConfig(str(SOURCE), trained_run(SOURCE).digest, distill)
        return replace(make_config(family, **changes), start=start)

    return make


def started(config, device="cpu"):
    """Blocks at their first step."""
    return config.build(device, start_weights(config, trained_run(SOURCE))).eval()


def levels(blocks, batch):
    shape = blocks.model.level_shape(batch)
    return blocks.process.level_at(blocks[0].noise, torch.full(shape, 0.4, dtype=torch.float64))


@families
@pytest.mark.parametrize("sharing", ["joint", "copies"])
def test_blocks_begin_with_the_bits_of_the_network_and_one_block_is_it(source, family, sharing):
    config = source(family, partition={"sharing": sharing})
    _, whole = load_run(SOURCE, device="cpu")
    for model in (blocks := started(config)).model, *blocks.copies:
        assert equal(model.state_dict(), whole.model.state_dict())
    one = started(replace(config, partition=replace(config.partition, num_blocks=1)))
    batch = make_data(family=family).batch(torch.arange(4))
    level = levels(whole, batch)
    z = whole.model.noisy(level, batch, DRAW)
    ours, theirs = (b.model.denoise(z, level, b[0].layers, batch) for b in (one, whole))
    assert torch.equal(ours, theirs)


def without_noise(config):
    """With what blocks of a network that never met noise are made with."""
    return replace(config, model=config.model.as_blocks())


@pytest.mark.parametrize("attends", [True, False])
def test_noisy_tokens_begin_as_the_clean_ones_beside_them_and_what_z_tells(source, attends):
    partition = {"noise_order": "deepest"}
    config = without_noise(source("ar", without_noise=True, partition=partition))
    _, whole = load_run(SOURCE, device="cpu")
    blocks, batch = started(config), make_data(family="ar").batch(torch.arange(4))
    layers = range(3)
    if not attends:
        for model in (whole.model, blocks.model):
            for layer in model.layers:
                torch.nn.init.zeros_(layer.attention.out.weight)
    guess = whole.model.guess(layers, batch)
    assert guess.std() > 0.1
    # the clean stream is the network, to the bit
    assert torch.equal(blocks.model.guess(layers, batch), guess)
    level = levels(blocks, batch)
    z = blocks.model.noisy(level, batch, DRAW)
    told = z @ blocks.model.unit_table().T / level[:, None, None].square()
    for block in (layers, blocks[0].layers):  # the deepest block reads through the layers before
        logits = blocks.model.denoise(z, level, block, batch)
        # the newest token is seen twice, which is all that is another
        same = slice(None) if not attends else slice(1)
        torch.testing.assert_close(logits[:, same], (guess + told)[:, same], rtol=1e-5, atol=1e-5)
        if attends:
            assert not torch.allclose(logits[:, 1:], (guess + told)[:, 1:], atol=1e-4)
    assert blocks[0].layers == (2,)


def test_a_pass_begins_as_one_recurrence_from_where_z_points(source):
    config = without_noise(source("huginn", without_noise=True))
    model, batch = started(config).model, make_data(family="huginn").batch(torch.arange(4))
    level = torch.full((4,), 3.0)
    scale = model.prediction.scale(level)[:, None, None]
    state = model.norm(torch.randn(*batch["token"].shape, model.config.dim))
    z, token = state / scale, batch["token"]
    e, c = model._prelude([0], token), model.constant_condition(4)
    x = model.run([1, 2], model._adapted(state, model.from_tokens(e)), c)
    told = z @ model.unit_table().T / level[:, None, None].square()
    expected = model.head.logits(model.head.clean(x, c), None) + told
    found = model.denoise(z, level, range(3), batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(model.condition(log_level(level)), torch.zeros(4, c.shape[1]))


# the whole network as a teacher


def taught(config, share, batch):
    """Loss of a middle block that a network in one block teaches, and the block's gradients."""
    blocks = started(config)
    teacher = started(config).model.requires_grad_(False)
    block = list(blocks)[len(blocks) // 2]
    loss = Distillation(teacher, share)(blocks, block, batch, DRAW)
    loss.backward()
    return loss.item(), {n: p.grad for n, p in blocks.named_parameters() if p.grad is not None}


@families
def test_a_network_that_teaches_itself_has_nothing_to_learn_and_no_share_is_the_plain_loss(
    source, family
):
    config = source(family, distill=1.0)
    if family == "ar":
        config = replace(config, model=replace(config.model, next_token_weight=0.0))
    batch = make_data(family=family).batch(torch.arange(4))
    one = replace(config, partition=replace(config.partition, num_blocks=1))
    _, gradients = taught(one, 1.0, batch)
    assert gradients and all(g.abs().max() < 1e-5 for g in gradients.values())
    # blocks of some layers have something to learn; the losses mix as their targets do
    losses = [taught(config, share, batch)[0] for share in (0.0, 0.25, 1.0)]
    blocks = started(config)
    block = blocks[1]
    assert losses[0] == pytest.approx(blocks.loss(block, batch, DRAW).item(), rel=1e-4)
    assert losses[2] != pytest.approx(losses[0], rel=1e-2)
    if not isinstance(blocks.model, ImageDenoiser):
        assert losses[1] == pytest.approx(0.75 * losses[0] + 0.25 * losses[2], rel=1e-4)
    else:
        teacher, z = started(config).model, None
        level, scale = blocks._levels(block, batch, DRAW)
        z = blocks.model.noisy(level, batch, DRAW)
        wanted = 0.75 * batch["image"] + 0.25 * teacher.denoise(z, level, range(3), batch)
        errors = (blocks.model.denoise(z, level, block.layers, batch) - wanted).square()
        expected = (scale * errors.flatten(1).mean(1)).sum().item()
        assert losses[1] == pytest.approx(expected, rel=1e-4)


def test_what_the_clean_stream_guesses_is_its_own_whatever_is_taught(source):
    config, batch = source("ar", distill=1.0), make_data(family="ar").batch(torch.arange(4))
    without, with_guess = (
        taught(replace(config, model=replace(config.model, next_token_weight=w)), 1.0, batch)[0]
        for w in (0.0, 2.0)
    )
    blocks = started(config)
    guessed = blocks.model.conventional_loss(DRAW, blocks[1].layers, batch)
    assert with_guess - without == pytest.approx(2 * guessed.item(), rel=1e-4)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize(
    ("family", "settings"), [("ar", {}), ("dit", {**CPU, "steps_per_swap": 2})]
)
def test_a_run_that_is_taught_resumes_without_the_source_to_the_same_bits(
    source, train, family, settings
):
    config = source(family, distill=0.5, **settings)
    whole = train(config, "whole", trained=trained_run(SOURCE))
    table = {n: p for n, p in weights(whole).items() if "target_table" in n}
    assert all(torch.equal(p, trained_run(SOURCE).weights[n[6:]]) for n, p in table.items())

    def on_row(row):
        if row["step"] == 5:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(config, trained=trained_run(SOURCE), on_row=on_row)
    shutil.rmtree(SOURCE)
    assert equal(weights(train(config, resume="latest")), weights(whole))
    # another teacher is noticed
    tensors, _ = checkpoint.load(Path("run/trained/step-00000000"))
    checkpoint.save(Path("run/trained"), 0, tensors, {"digest": "other"})
    with pytest.raises(ValueError, match=r"must be of the network \w+, got other"):
        train(config, resume="latest")


def test_a_layer_of_an_offloaded_teacher_is_on_the_device_while_it_runs():
    layers = [torch.nn.Linear(3, 3).requires_grad_(False) for _ in range(2)]
    seen, host = [], [layer.weight.data_ptr() for layer in layers]
    for layer in layers:
        one_at_a_time(layer, lambda tensor: tensor + 1)

    def here(*_):
        pairs = zip(layers, host, strict=True)
        seen.append([layer.weight.data_ptr() == place for layer, place in pairs])

    x = torch.ones(2, 3)
    expected = torch.nn.functional.linear(x, layers[1].weight + 1)
    layers[1].register_forward_pre_hook(here)
    assert torch.equal(layers[1](x), expected + layers[1].bias + 1)
    with pytest.raises(RuntimeError):
        layers[0](torch.ones(2, 4))
    here()
    assert seen == [[True, False], [True, True]]


# what is refused


def changed(weights, **new):
    return {name: new.get(name.replace(".", "_"), tensor) for name, tensor in weights.items()}


def other(trained, **changes):
    """The network with other weights or settings, and its digest."""
    found = replace(trained, **changes)
    return found, {"start": StartConfig("source", found.digest)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda t, c: (t, {"model": replace(c.model, dim=8, num_heads=1)}),
            r"dim must be 16 as in source.*, got 8",
        ),
        (
            lambda t, c: (t, {"model": replace(c.model, sigma_data=1.0)}),
            r"sigma_data must be 0.5 as in source.*, got 1.0",
        ),
        (
            lambda t, c: other(t, weights={n: w for n, w in t.weights.items() if n != "head.bias"}),
            r"head.bias of source.* must be \(4,\), got no such tensor",
        ),
        (
            lambda t, c: other(t, weights={**t.weights, "more": torch.ones(2)}),
            r"more of source.* must be no such tensor, got \(2,\)",
        ),
        (
            lambda t, c: other(t, weights=changed(t.weights, head_bias=torch.ones(5))),
            r"head.bias of source.* must be \(4,\), got \(5,\)",
        ),
        (
            lambda t, c: other(
                t, weights=changed(t.weights, head_bias=torch.full((4,), torch.nan))
            ),
            "head.bias of source.* must be finite, got numbers that are not",
        ),
        (
            lambda t, c: other(t, family="vit", config=CONFIGS["vit"]),
            "family must be vit as in source.*, got dit",
        ),
        (
            lambda t, c: (t, {"start": StartConfig("source", "0" * 16)}),
            r"trained must be the network 0{16} that the configuration names, got \w{16}",
        ),
        (lambda t, c: (None, {}), "trained must be the network .*, got None"),
        (lambda t, c: (t, {"start": StartConfig()}), "trained must be the network None that"),
    ],
)
def test_a_network_that_blocks_cannot_start_from_is_refused_and_nothing_is_written(
    source, train, call, message
):
    config = source("dit")
    trained, changes = call(trained_run(SOURCE), config)
    with pytest.raises(ValueError, match=message):
        train(replace(config, **changes), trained=trained)
    assert not Path("run").exists()


def blocks_of(source, train):
    train(replace(source("dit"), start=StartConfig()), "blocks")
    return trained_run(Path("blocks"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s, t: StartConfig("a", "b", 1.5), "distill must be from 0 to 1, got 1.5"),
        (
            lambda s, t: StartConfig(distill=0.5),
            "distill must be 0 for a run that starts from no trained network, got 0.5",
        ),
        (
            lambda s, t: replace(
                s("ar", distill=0.5), objective="conventional", partition=PartitionConfig(1)
            ),
            "distill must be 0 for the conventional objective, which has no levels of noise, got 0",
        ),
        (blocks_of, "must hold a network that was trained end to end, in one block, got 3"),
        (lambda s, t: trained_run(Path("none")), "must hold config.json, got none in none"),
    ],
)
def test_rejects(source, train, call, message):
    with pytest.raises(ValueError, match=message):
        call(source, train)
