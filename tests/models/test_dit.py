import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise

from dbkernels.diffusion.prediction import EDM
from dbkernels.models import DiT, DiTConfig
from dbkernels.models.dit import PRESETS
from dbkernels.models.embed import grid_positions, patchify, unpatchify
from dbkernels.models.layer import run_layers
from dbkernels.ops import Draw, adaln_norm, add_noise, normals, score_loss

# 9 patches of 12 numbers, a width of 8
CONFIG = DiTConfig(
    dim=8,
    depth=2,
    num_heads=2,
    image_size=6,
    channels=3,
    num_classes=4,
    mlp_ratio=3,
    sigma_data=0.7,
)
LEVEL = torch.tensor([0.05, 0.9, 40.0])
SCALE = torch.tensor([2.0, 0.25, 1.5])


def make_model():
    return randomise(DiT(CONFIG))


def make_batch():
    return {"image": torch.randn(3, 3, 6, 6), "label": torch.tensor([3, 0, 2])}


def first_tokens(model, z, level, batch):
    """What the first layer receives, and the condition."""
    seen = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model.denoise(z, level, (0,), batch)
    hook.remove()
    return seen[0][:2]


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("S/2", 32_858_896),
        ("B/2", 130_303_504),
        ("L/2", 457_824_272),
        ("XL/2", 674_816_272),
    ],
)
def test_the_published_models_have_as_many_parameters(name, count):
    with torch.device("meta"):
        model = DiT(PRESETS[name])
    assert sum(p.numel() for p in model.parameters()) == count


def test_the_denoised_image_is_the_preconditioned_network():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 3, 6, 6)
    x, c = first_tokens(model, z, LEVEL, batch)
    for layer in model.layers:
        x = layer(x, c)
    shift, scale = model.modulation.linear(F.silu(c))[:, None].chunk(2, dim=-1)
    tokens = model.head((1 + scale) * F.layer_norm(x, (8,), eps=1e-6) + shift)
    rows = tokens.view(3, 3, 3, 2, 2, 3)  # row of patches, column, y, x, channel
    network = torch.einsum("brcyxk->bkrycx", rows).reshape(3, 3, 6, 6)
    sigma, data = LEVEL.view(3, 1, 1, 1), CONFIG.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / (sigma**2 + data**2).sqrt()
    actual = model.denoise(z, LEVEL, (0, 1), batch)
    torch.testing.assert_close(actual, skip * z + out * network)


def written_out(model, scaled, level, layers, label):
    """F of the module's equations, op by op in one function."""
    c = model.condition(torch.log(level) / 4) + model.label_table(label)
    x = model.patch(patchify(scaled, CONFIG.patch)) + model.positions
    x = run_layers([model.layers[index] for index in layers], x, c)
    shift, scale = model.modulation.linear(F.silu(c)).chunk(2, dim=-1)
    tokens = model.head(adaln_norm(x, scale, shift, dtype=scale.dtype))
    return unpatchify(tokens, CONFIG.patch, CONFIG.channels)


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_have_the_bits_of_the_equations_written_out(autocast):
    model, batch, draw = make_model(), make_batch(), Draw(seed=2, step=5)
    image = batch["image"]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.loss(draw, LEVEL, SCALE, (0, 1), batch)
        prediction = EDM(CONFIG.sigma_data)
        exact = LEVEL.double()
        target = (each.float() for each in prediction.target(exact))
        scaled = add_noise(image, *(each.float() for each in prediction.input(exact)), draw)
        network = written_out(model, scaled, LEVEL, (0, 1), batch["label"])
        weight = (SCALE * prediction.estimate(exact)[1].square()).float()
        expected, _ = score_loss(network, image, *target, draw, weight=weight, reduction="sum")
    assert torch.equal(loss, expected)
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(each, parameters) for each in (loss, expected))
    assert all(map(torch.equal, *grads))


def test_tokens_are_scaled_patches_at_their_positions():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 3, 6, 6)
    x, _ = first_tokens(model, z, LEVEL, batch)
    corner = z[:, :, 2:4, 4:].permute(0, 2, 3, 1).flatten(1)  # the sixth in reading order
    c_in = 1 / (LEVEL[:, None] ** 2 + CONFIG.sigma_data**2).sqrt()
    torch.testing.assert_close(x[:, 5], model.patch(c_in * corner) + grid_positions(3, 8)[5])


def test_the_condition_adds_the_noise_and_the_label():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 3, 6, 6)
    _, c = first_tokens(model, z, LEVEL, batch)
    label = model.label_table.weight[[3, 0, 2]]
    torch.testing.assert_close(c, model.condition(torch.log(LEVEL) / 4) + label)


def test_an_untrained_denoiser_shrinks_its_input():
    z = torch.randn(3, 3, 6, 6)
    skip = CONFIG.sigma_data**2 / (LEVEL**2 + CONFIG.sigma_data**2)
    actual = DiT(CONFIG).denoise(z, LEVEL, (0, 1), make_batch())
    torch.testing.assert_close(actual, skip.view(3, 1, 1, 1) * z, rtol=1e-6, atol=0)


def test_a_new_models_weights_are_those_of_the_paper():
    model = DiT(replace(PRESETS["digits"], num_classes=100))
    assert model.label_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for linear in (model.patch, model.layers[0].mlp.fc1):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert not linear.bias.any()


def test_the_target_is_the_image_and_the_estimate_the_prediction():
    model, batch = make_model(), make_batch()
    assert model.target(batch) is batch["image"]
    prediction = torch.randn(3, 3, 6, 6)
    assert model.estimate(prediction) is prediction


def test_the_loss_is_the_mean_squared_error_of_the_denoised_image():
    model, batch, draw = make_model(), make_batch(), Draw(seed=2, step=5)
    noise = normals(draw, 3, 3 * 6 * 6).view(3, 3, 6, 6)
    z = batch["image"] + LEVEL.view(3, 1, 1, 1) * noise
    error = model.denoise(z, LEVEL, (0, 1), batch) - batch["image"]
    expected = error.square().flatten(1).mean(1)
    expected_grads = torch.autograd.grad(expected.sum(), list(model.parameters()))
    losses = model.losses(draw, LEVEL, (0, 1), batch)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-6)
    loss = model.loss(draw, LEVEL, torch.ones(3), (0, 1), batch)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())


def test_the_loss_is_computed_in_float32_under_autocast():
    model, batch = make_model(), make_batch()
    exact = model.losses(Draw(0, 0), LEVEL, (0, 1), batch)
    with torch.autocast("cpu", torch.bfloat16):
        losses = model.losses(Draw(0, 0), LEVEL, (0, 1), batch)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses, exact, rtol=0.1, atol=0.01)


def test_the_unconditional_batch_uses_the_last_row():
    model, batch = make_model(), {**make_batch(), "mask": torch.ones(3)}
    without = model.unconditional(batch)
    assert without["label"].tolist() == [4, 4, 4] and without["label"].dtype == torch.int64
    assert without["image"] is batch["image"] and without["mask"] is batch["mask"]
    assert batch["label"].tolist() == [3, 0, 2]
    model.denoise(torch.randn(3, 3, 6, 6), LEVEL, (0,), without).sum().backward()
    assert model.label_table.weight.grad.any(1).tolist() == [False] * 4 + [True]


def test_positions_are_not_saved_and_move_with_the_model():
    model = DiT(CONFIG)
    assert "positions" not in model.state_dict()
    assert "positions" in dict(model.named_buffers())


def test_samples_are_denoised_each_at_its_own_level_and_label():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 3, 6, 6)
    together = model.denoise(z, LEVEL, (0, 1), batch)
    for i in range(3):
        alone = {"label": batch["label"][i : i + 1]}
        one = model.denoise(z[i : i + 1], LEVEL[i : i + 1], (0, 1), alone)
        torch.testing.assert_close(one[0], together[i])


def test_rejects_a_patch_that_does_not_divide_the_image():
    with pytest.raises(ValueError, match="patch must divide the image size, got 4 and 6"):
        replace(CONFIG, patch=4)


def test_rejects_a_width_without_positions():
    with pytest.raises(ValueError, match="a width that 4 divides, got 6"):
        DiT(replace(CONFIG, dim=6))
