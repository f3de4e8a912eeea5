"""What the masked text family alone has: its masks, the rows that its head reads, its samples."""

import math
from dataclasses import replace

import pytest
import torch
from models.tiny import CONFIGS, DRAW, levels_of, make_batch, make_model

from dbkernels.diffusion.likelihood import masked_bound
from dbkernels.diffusion.masked import MASK, Masked
from dbkernels.diffusion.process import Interval
from dbkernels.diffusion.unmask import unmask
from dbkernels.models import MDM, MDMConfig
from dbkernels.ops import Draw, uniforms
from dbkernels.training.diffusion_blocks import DiffusionBlocks

LONG = replace(CONFIGS["mdm"], length=200)
LOW = Interval(0.01, 0.1)


@pytest.fixture
def model():
    return make_model("mdm")


def test_tokens_are_masked_as_often_as_the_level_says_and_alike_in_every_cut():
    model = MDM(replace(LONG, length=4000))
    batch, (level, _) = make_batch(model), levels_of(model)
    masked = model.masked(DRAW, level, batch)
    torch.testing.assert_close(masked.float().mean(1), level, rtol=0, atol=0.04)
    last = model.masked(replace(DRAW, sample=2), level[2:], {"token": batch["token"][2:]})
    assert torch.equal(last, masked[2:])
    # a token's number must not be that of a sample's level, nor of another step
    assert not torch.equal(uniforms(DRAW.nth(-1), 3), uniforms(DRAW, 3))
    assert not torch.equal(model.masked(replace(DRAW, step=6), level, batch), masked)


def loss_and_gradients(model, level, batch, interval):
    loss = model.loss(DRAW, level, torch.tensor([2.0, 0.25, 1.5]), range(3), batch, interval)
    return loss, torch.autograd.grad(loss, list(model.parameters()))


def test_gathered_rows_give_the_loss_and_gradients_of_all(model):
    model = make_model("mdm")
    batch = {"token": torch.randint(5, (3, 200), generator=torch.Generator().manual_seed(3))}
    level = torch.tensor([0.02, 0.1, 0.06])
    assert model.capacity(600, LOW.high) < 600 == model.capacity(600, 0.9)
    loss, gradients = loss_and_gradients(model, level, batch, LOW)
    whole, expected = loss_and_gradients(model, level, batch, Interval(0.01, 0.9))
    losses = model.losses(DRAW, level, range(3), batch)
    torch.testing.assert_close(loss, (torch.tensor([2.0, 0.25, 1.5]) * losses).sum())
    torch.testing.assert_close(loss, whole, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients, expected, rtol=1e-5, atol=1e-6)


def test_a_step_that_masks_more_than_its_levels_ever_do_has_no_loss():
    model, batch = MDM(LONG), make_batch(MDM(LONG))
    loss, gradients = loss_and_gradients(model, torch.full((3,), 0.9), batch, LOW)
    assert loss.isnan() and any(gradient.isnan().any() for gradient in gradients)


@pytest.mark.parametrize("tokens", [1, 40, 600, 65536])
@pytest.mark.parametrize("highest", [1e-4, 0.03, 1 / 3, 0.9, 1.0])
def test_a_step_masks_more_than_the_capacity_in_no_run(model, tokens, highest):
    """By the exact tail of the binomial law of as many tokens at the greatest level."""
    capacity = model.capacity(tokens, highest)
    assert highest * tokens <= capacity <= tokens
    ln_pmf = [
        math.lgamma(tokens + 1) - math.lgamma(k + 1) - math.lgamma(tokens - k + 1)
        + k * math.log(highest) + (tokens - k) * math.log1p(-highest)
        for k in (range(capacity + 1, tokens + 1) if highest < 1 else ())
    ]  # fmt: skip
    assert sum(map(math.exp, ln_pmf)) < 1e-12
    assert capacity < highest * tokens + 9 * (tokens * highest * (1 - highest)) ** 0.5 + 23


def test_the_place_of_a_masked_token_does_not_know_it_and_every_other_does(model):
    """Attention is in both directions, and a mask hides what it covers."""
    batch, (level, _) = make_batch(model), levels_of(model)
    token = batch["token"]
    z = token.clone()
    z[:, 3] = MASK
    before = model.denoise(z, level, range(3), batch)
    for place in (0, 6):
        other = z.clone()
        other[:, place] = (token[:, place] + 1) % 5
        after = model.denoise(other, level, range(3), batch)
        assert not torch.isclose(after, before).all(-1).any()
    elsewhere = {"token": token + 0}
    elsewhere["token"][:, 3] = (token[:, 3] + 1) % 5
    assert torch.equal(model.denoise(z, level, range(3), elsewhere), before)


def test_a_token_knows_its_place_in_windows_of_any_length(model):
    level = torch.tensor([0.5])
    z = torch.tensor([[1, MASK, 2, 2, 0]])
    logits = model.denoise(z, level, range(3), {})
    reversed_ = model.denoise(z.flip(1), level, range(3), {}).flip(1)
    assert not torch.isclose(logits, reversed_).all()
    assert logits.shape == (1, 5, 5)  # a length that is not the configuration's, and no mask column


@pytest.mark.parametrize("process", [Masked(), Masked("cosine")])
def test_a_model_that_says_nothing_needs_all_bits_of_the_vocabulary(process):
    model = MDM(replace(CONFIGS["mdm"], vocabulary=27, length=64))
    blocks = DiffusionBlocks(model, 3, process=process)
    token = torch.randint(27, (2048, 64), generator=torch.Generator().manual_seed(0))
    levels, losses = [], []
    for block in blocks:
        u = process.quantiles(DRAW, (len(token),), "cpu")
        levels.append(process.level_at(block.noise, u))
        with torch.no_grad():
            losses.append(model.losses(DRAW, levels[-1], block.layers, {"token": token}))
    bound = masked_bound(process, [b.noise for b in blocks], levels, losses, 27)
    bits = [nats / math.log(2) for nats in bound.blocks]
    # of 131,072 tokens, of which few are masked where the weight is large
    assert bits == pytest.approx([1.584963] * 3, rel=0.02)
    assert bound.nats / math.log(2) == pytest.approx(4.754888, rel=0.01)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_mean_loss_of_a_linear_block_is_its_part_of_the_bound(schedule):
    """A step's loss times the time that its interval takes, over many steps."""
    model = MDM(replace(CONFIGS["mdm"], vocabulary=27, length=64))
    blocks = DiffusionBlocks(model, 3, process=Masked(schedule), gamma=0)
    batch = {"token": torch.randint(27, (256, 64), generator=torch.Generator().manual_seed(0))}
    for block in blocks:
        with torch.no_grad():
            steps = [float(blocks.loss(block, batch, Draw(0, step))) for step in range(8)]
        part = sum(steps) / 8 * blocks.process.duration(block.noise)
        assert part == pytest.approx(math.log(27) / 3, rel=0.03)


def test_samples_are_opened_by_the_block_of_each_level_and_keep_their_prompt(model):
    blocks = DiffusionBlocks(model, 3)
    start, ran = torch.full((4, 7), MASK), []
    start[:, :2] = torch.tensor([4, 1])
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, i=index: ran.append(i))
    levels = blocks.process.grid(6)
    tokens = unmask(blocks.denoiser({"token": start}), start, levels, DRAW)
    assert ran == [0, 0, 1, 1, 2, 2]
    assert (tokens[:, :2] == torch.tensor([4, 1])).all() and ((tokens >= 0) & (tokens < 5)).all()
    alone = unmask(
        blocks.denoiser({"token": start[3:]}), start[3:], levels, replace(DRAW, sample=3)
    )
    assert torch.equal(alone, tokens[3:])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"vocabulary": 0}, "vocabulary must be at least 1, got 0"),
        ({"num_heads": 3}, "dim must be a multiple of num_heads, got 8 and 3"),
    ],
)
def test_rejects(changes, message):
    with pytest.raises(ValueError, match=message):
        MDM(MDMConfig(**{**vars(CONFIGS["mdm"]), **changes}))
