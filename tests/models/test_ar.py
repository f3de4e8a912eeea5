"""What a block of the autoregressive family reads, and what its loss is made of."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from models.tiny import DRAW, INTERVAL, LEVEL, SCALE, randomise

from dbkernels.models import AR, ARConfig
from dbkernels.models.branches import initialise_linear
from dbkernels.ops import add_noise

CONFIG = ARConfig(
    dim=8, depth=4, num_heads=2, mlp_hidden=6, cond_dim=5, length=6, vocabulary=7, sigma_data=0.7
)
TOKEN = torch.tensor([[3, 0, 5, 2, 6, 1], [1, 1, 4, 0, 2, 3], [6, 5, 4, 3, 2, 1]])
CHANGED = 2  # place of the token that is another
every_clean = pytest.mark.parametrize("clean", ["own", "through"])
every_input = pytest.mark.parametrize("noisy_input", ["z", "z_and_clean"])


def make(**settings):
    torch.manual_seed(3)
    return randomise(AR(replace(CONFIG, **settings)))


def noisy(model, level=LEVEL):
    return add_noise(model.target({"token": TOKEN}), torch.ones_like(level), level, DRAW)


def moved(before, after):
    """Places of tokens whose numbers are others."""
    return (before != after).any(-1).any(0).nonzero().flatten().tolist()


@every_clean
@every_input
@pytest.mark.parametrize("layers", [(0, 1), (2, 3), (0, 1, 2, 3)])
def test_a_token_reads_the_tokens_before_it_and_its_own_noise_alone(clean, noisy_input, layers):
    model = make(clean=clean, noisy_input=noisy_input)
    denoise, z = partial(model.denoise, level=LEVEL, layers=layers), noisy(model)
    before = denoise(z, batch={"token": TOKEN})
    other = TOKEN.clone()
    other[:, CHANGED] = (other[:, CHANGED] + 1) % CONFIG.vocabulary
    assert moved(before, denoise(z, batch={"token": other})) == [3, 4, 5]
    z = z.clone()
    z[:, CHANGED] += 1
    assert moved(before, denoise(z, batch={"token": TOKEN})) == [CHANGED]


@every_clean
@every_input
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_gradients_stay_in_the_block_however_deep_its_context_is(clean, noisy_input, weight):
    model = make(clean=clean, noisy_input=noisy_input, next_token_weight=weight)
    model.loss(DRAW, LEVEL, SCALE, (2, 3), {"token": TOKEN}, INTERVAL).backward()
    for name, parameter in model.named_parameters():
        other = name.startswith(("layers.0.", "layers.1."))
        assert (parameter.grad is None) == other, name
        assert other or parameter.grad.any(), name


def met_by(model, call):
    """What the third layer is given in a call."""
    met = []
    hook = model.layers[2].register_forward_pre_hook(lambda _, args: met.append(args[0].detach()))
    call()
    hook.remove()
    return met[-1]


@every_clean
def test_a_block_meets_the_clean_stream_as_the_table_or_the_layers_before_it_leave_it(clean):
    model, batch = make(clean=clean), {"token": TOKEN}
    given = met_by(model, lambda: model.denoise(noisy(model), LEVEL, (2, 3), batch))[3:]
    deep = met_by(model, lambda: model.conventional_losses(DRAW, range(4), batch))
    before = F.pad(TOKEN[:, :-1], (1, 0), value=CONFIG.vocabulary)
    shallow = model.clean_table.weight[before]
    torch.testing.assert_close(given, deep if clean == "through" else shallow)


@every_clean
@every_input
def test_the_noisy_stream_begins_with_z_or_goes_on_from_the_clean_one(clean, noisy_input):
    model, batch = make(clean=clean, noisy_input=noisy_input), {"token": TOKEN}
    z = noisy(model)
    met = met_by(model, lambda: model.denoise(z, LEVEL, (2, 3), batch))
    p = (LEVEL**2 + 0.7**2).rsqrt()[:, None, None]
    under = met[3:] if noisy_input == "z_and_clean" else torch.zeros_like(met[3:])
    torch.testing.assert_close(met[:3], p * z + under)


@every_clean
@pytest.mark.parametrize("read_out", ["paper", "posterior"])
def test_the_clean_streams_own_loss_is_added_with_its_weight(clean, read_out):
    batch, layers = {"token": TOKEN}, (0, 1, 2)
    without, half = (make(clean=clean, read_out=read_out, next_token_weight=w) for w in (0.0, 0.5))
    losses = [m.loss(DRAW, LEVEL, SCALE, layers, batch, INTERVAL) for m in (without, half)]
    denoising = (SCALE * without.losses(DRAW, LEVEL, layers, batch)).sum()
    torch.testing.assert_close(losses[0], denoising)
    guessing = half.conventional_loss(DRAW, layers, batch)
    torch.testing.assert_close(losses[1], denoising + guessing / 2)
    torch.testing.assert_close(guessing, half.conventional_losses(DRAW, layers, batch).mean())


@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_a_block_learns_from_the_networks_guess_and_no_layer_behind_it_does(recompute):
    told = {"clean": "through", "next_token_from": "network", "recompute": recompute}
    batch, block, every = {"token": TOKEN}, (1, 2), range(4)
    without, whole = (make(**told, next_token_weight=w) for w in (0.0, 0.5))
    loss = whole.loss(DRAW, LEVEL, SCALE, block, batch, INTERVAL)
    denoising = without.loss(DRAW, LEVEL, SCALE, block, batch, INTERVAL)
    guessing = whole.conventional_loss(DRAW, every, batch)
    torch.testing.assert_close(loss, denoising + guessing / 2)
    taught = whole.denoise(z := noisy(whole), LEVEL, every, batch).detach()
    shared = whole.taught_loss(z, taught, 0.5, LEVEL, SCALE, block, batch)
    alone = without.taught_loss(z, taught, 0.5, LEVEL, SCALE, block, batch)
    torch.testing.assert_close(shared, alone + guessing / 2)

    own = [p for index in block for p in whole.layers[index].parameters()]
    through = torch.autograd.grad(guessing / 2, own)
    denoised = [p for index in block for p in without.layers[index].parameters()]
    expected = [
        a + b for a, b in zip(through, torch.autograd.grad(denoising, denoised), strict=True)
    ]
    loss.backward()
    torch.testing.assert_close([p.grad for p in own], expected)
    assert all(p.grad is None for index in (0, 3) for p in whole.layers[index].parameters())
    assert whole.head.linear.weight.grad.any() and all(p.requires_grad for p in whole.parameters())


def test_conventional_losses_are_those_of_the_next_token():
    model = make()
    torch.manual_seed(0)
    other = TOKEN.clone()
    other[:, -1] = (other[:, -1] + 1) % CONFIG.vocabulary
    every = [model.conventional_losses(DRAW, range(4), {"token": t}) for t in (TOKEN, other)]
    assert (every[0] != every[1]).all()
    # a head that knows nothing is at the logarithm of the number of words
    initialise_linear(model.head.linear, torch.nn.init.zeros_)
    known = model.conventional_losses(DRAW, range(4), {"token": TOKEN})
    torch.testing.assert_close(known, torch.full((3,), 7.0).log())


def test_with_the_posterior_read_out_a_head_of_zeros_answers_by_bayes_rule():
    model = make(read_out="posterior")
    initialise_linear(model.head.linear, torch.nn.init.zeros_)
    z, rows = noisy(model), F.normalize(model.target_table.weight, dim=-1)
    logits = model.denoise(z, LEVEL, (1,), {"token": TOKEN})
    distance = (z[:, :, None] - rows).square().sum(-1) / (2 * LEVEL.square()[:, None, None])
    torch.testing.assert_close(logits.softmax(-1), (-distance).softmax(-1), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("read_out", ["paper", "posterior"])
def test_tokens_of_one_level_each_are_as_samples_of_one_level(read_out):
    of_sample, of_token = (make(read_out=read_out, levels_of=of) for of in ("sample", "token"))
    batch = {"token": TOKEN}
    assert of_sample.level_shape(batch) == (3,) and of_token.level_shape(batch) == TOKEN.shape
    level = LEVEL[:, None].expand(TOKEN.shape).contiguous()
    scale = (SCALE[:, None] / 6).expand(TOKEN.shape).double()
    loss = of_token.loss(DRAW, level, scale, (0, 1), batch, INTERVAL)
    expected = of_sample.loss(DRAW, LEVEL, SCALE, (0, 1), batch, INTERVAL)
    torch.testing.assert_close(loss, expected)
    # and each token has its own: others do not feel a change of one
    level[:, CHANGED] *= 2
    z, told = noisy(of_token), {"layers": (0, 1), "batch": batch}
    before = of_token.denoise(z, LEVEL[:, None].expand(TOKEN.shape), **told)
    assert moved(before, of_token.denoise(z, level, **told)) == [CHANGED]


def test_an_estimate_is_the_expected_row():
    model = make()
    logits = torch.log(torch.tensor([0.5, 0.5, 0, 0, 0, 0, 0]) + 1e-30).expand(3, 6, 7)
    rows = F.normalize(model.target_table.weight, dim=-1)
    torch.testing.assert_close(model.estimate(logits), (rows[:2].mean(0)).expand(3, 6, 8))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"clean": "both"}, "clean must be one of own, through, got both"),
        ({"read_out": "tied"}, "read_out must be one of paper, posterior, got tied"),
        ({"levels_of": "batch"}, "levels_of must be one of sample, token, got batch"),
        ({"next_token_weight": -1.0}, "next_token_weight must be finite and at least 0, got -1.0"),
        ({"next_token_weight": float("nan")}, "next_token_weight must be finite"),
        ({"next_token_from": "all"}, "next_token_from must be one of block, network, got all"),
        ({"next_token_from": "network"}, "clean must be through where next_token_from is network"),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
    ],
)
def test_rejects(settings, message):
    with pytest.raises(ValueError, match=message):
        replace(CONFIG, **settings)
