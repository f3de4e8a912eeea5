"""A DiT of every process and prediction: its equations, what it is trained for, and how it runs."""

import copy
from dataclasses import replace

import pytest
import torch
from accuracy import assert_as_accurate_as_eager
from models.tiny import CONFIGS, DRAW, LEVEL, make_batch, randomise
from training.tiny import DIT as SMALL
from training.tiny import PREFETCH, assert_same, copies, make_data

from dbkernels import DiffusionBlocks, DiT, Flow, LogNormal, Timesteps, Trainer
from dbkernels.diffusion.prediction import PREDICTIONS
from dbkernels.models.layer import run_layers
from dbkernels.ops import add_noise

PROCESSES = {"gaussian": LogNormal(), "flow": Flow(), "vp": Timesteps()}
LEVELS = {"gaussian": LEVEL, "flow": torch.tensor([0.02, 0.6, 1.0])}
LEVELS["vp"] = torch.tensor([0.0, 260.0, 999.0])
NOISES = [(process, name) for process, names in PREDICTIONS.items() for name in names]
each_noise = pytest.mark.parametrize(("process", "name"), NOISES)


def configured(config, process, name):
    return replace(config, process=process, prediction=name)


def answer(model, scaled, level, batch):
    """F, by the stem, all layers and the tail."""
    x, c = model.stem(scaled, level, model.label_table(batch["label"]))
    return model.tail(run_layers(model.layers, x, c), c)


def noise_of(image):
    """That of the op itself, whose logarithms are its own."""
    zeros = torch.zeros(len(image))
    blank = torch.zeros(image.shape, dtype=torch.float32)
    return add_noise(blank, zeros, zeros + 1, DRAW).to(image.dtype)


def wide(pair):
    return [each[:, None, None, None] for each in pair]


def written_out(model, level, scale, batch):
    """The loss by the table of predictions."""
    image, prediction = batch["image"], model.prediction
    level = level.to(image.dtype)
    (p, q), (alpha, beta) = wide(prediction.input(level)), wide(prediction.target(level))
    F = answer(model, p * image + q * noise_of(image), level.float(), batch)
    errors = (F - alpha * image - beta * noise_of(image)).square().flatten(1).mean(1)
    return (scale.to(errors) * prediction.estimate(level)[1].square() * errors).sum()


def denoised(model, level, scale, batch):
    """The loss as the error of the denoised image, which takes no table of targets."""
    image, level = batch["image"], level.to(batch["image"].dtype)
    a, s = wide(model.prediction.path(level))
    found = model.denoise(a * image + s * noise_of(image), level, range(3), batch)
    return (scale.to(found) * (found - image).square().flatten(1).mean(1)).sum()


def with_gradients(loss, model):
    return loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))


@each_noise
def test_loss_and_gradients_are_as_accurate_as_the_equations_in_plain_torch(process, name):
    # larger weights make more of the last digits than both ways can hold
    model = randomise(DiT(configured(CONFIGS["dit"], process, name)), std=0.2)
    batch, level = make_batch(model), LEVELS[process]
    # so large that each sample counts
    scale = PROCESSES[process].weight(level.double(), model.prediction)
    actual = with_gradients(
        model.loss(DRAW, level, scale, range(3), batch, PROCESSES[process].range), model
    )
    eager = with_gradients(written_out(model, level, scale, batch), model)
    exact_model, exact_batch = copy.deepcopy(model).double(), dict(batch)
    exact_batch["image"] = batch["image"].double()
    exact = with_gradients(denoised(exact_model, level, scale, exact_batch), exact_model)
    twin = with_gradients(written_out(exact_model, level, scale, exact_batch), exact_model)
    torch.testing.assert_close(twin, exact, rtol=1e-6, atol=1e-6)
    for i, values in enumerate(zip(actual, eager, exact, strict=True)):
        assert_as_accurate_as_eager(f"{process} {name} {i}", *values)
    losses = model.losses(DRAW, level, range(3), batch)
    torch.testing.assert_close((scale * losses).sum().float(), actual[0])


def published_target(name, image, noise, a, s):
    """What is predicted, where each is from."""
    return {
        "velocity": noise - image,  # arXiv:2403.03206, equation 2
        "v": a * noise - s * image,  # arXiv:2202.00512, section 4
        "epsilon": noise,  # arXiv:2006.11239, equation 14
        "x0": image,
    }[name]


@pytest.mark.parametrize(("process", "name"), [noise for noise in NOISES if noise[1] != "edm"])
def test_a_block_is_trained_as_published_on_the_plain_mean_of_what_it_predicts(process, name):
    model = randomise(DiT(configured(CONFIGS["dit"], process, name)))
    blocks, batch = DiffusionBlocks(model, 1), make_batch(model)
    assert blocks.process == PROCESSES[process] and blocks.weighting == "process"
    u = blocks.process.quantiles(DRAW, (3,), "cpu")
    level, image = blocks.process.level_at(blocks[0].trained_noise, u), batch["image"]
    a, s = wide(model.prediction.path(level))
    noise = noise_of(image)
    F = answer(model, a * image + s * noise, level, batch)
    expected = (F - published_target(name, image, noise, a, s)).square().mean()
    torch.testing.assert_close(blocks.loss(blocks[0], batch, DRAW), expected)


@each_noise
def test_trains_and_goes_on_with_one_block_on_the_device_to_the_same_bits(process, name):
    def trainer(**settings):
        torch.manual_seed(1)
        blocks = DiffusionBlocks(DiT(configured(SMALL, process, name)), 3, sharing="copies")
        how = {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema": 0.5}
        return Trainer(blocks, make_data(family="dit"), **how, **settings)

    whole, other = trainer(), trainer(**PREFETCH)
    while whole.step < 5:
        whole.step_block(whole.next_block())
    other.restore(copies(whole), whole.counters())
    for each in (whole, other):
        each.run()
    assert_same(other, whole)
    assert all(p.isfinite().all() for p in whole.blocks.parameters())


@each_noise
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
def test_samples_are_those_of_one_network_where_all_blocks_run_all_layers(process, name, sampler):
    torch.manual_seed(1)
    model = randomise(DiT(configured(SMALL, process, name)), std=0.1)
    asked = {"label": torch.tensor([2, 0])}
    one, three = (DiffusionBlocks(model, n, layers=[0, 1, 2] * n, split=[3] * n) for n in (1, 3))
    levels = one.process.grid(6, one.process.close)
    found = [blocks.sample(asked, levels, DRAW, sampler=sampler) for blocks in (one, three)]
    assert torch.equal(*found) and found[0].isfinite().all() and found[0].shape == (2, 1, 4, 4)


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (("flow", "edm"), "prediction of flow must be one of velocity, x0, got edm"),
        (("diffusion", "edm"), "process must be one of gaussian, flow, vp, got diffusion"),
    ],
)
def test_rejects(noise, message):
    with pytest.raises(ValueError, match=message):
        configured(SMALL, *noise)
