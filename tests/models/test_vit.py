import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise

from dbkernels.models import ViT, ViTConfig
from dbkernels.models.baseline import use_baseline
from dbkernels.models.embed import patchify
from dbkernels.models.layer import run_layers
from dbkernels.models.vit import PRESETS
from dbkernels.ops import Draw, add_noise, normals

# no two sizes agree: 4 patches of 12 numbers, 5 classes, a width of 8
CONFIG = ViTConfig(
    image_size=4,
    patch=2,
    channels=3,
    num_classes=5,
    dim=8,
    depth=2,
    num_heads=2,
    mlp_hidden=10,
    cond_dim=6,
    sigma_data=0.7,
)
LEVEL = torch.tensor([0.05, 0.9, 40.0])
DRAW = Draw(seed=2, step=5)


def make_model():
    return randomise(ViT(CONFIG))


def make_batch():
    return {"image": torch.randn(3, 3, 4, 4), "label": torch.tensor([4, 0, 2])}


def first_tokens(model, z, level, batch):
    """What the first layer receives, and the condition."""
    seen = []
    hook = model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args))
    model.denoise(z, level, (0,), batch)
    hook.remove()
    return seen[0][:2]


def c_in(sigma):
    return 1 / (sigma**2 + CONFIG.sigma_data**2).sqrt()


def test_the_published_cifar100_model_has_as_many_parameters():
    with torch.device("meta"):
        model = ViT(PRESETS["cifar100"])
    assert sum(p.numel() for p in model.parameters()) == 10_529_095
    assert {sum(p.numel() for p in layer.parameters()) for layer in model.layers} == {873_088}
    assert len(model.layers) == 12


def test_logits_are_the_head_of_the_preconditioned_denoiser():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 8)
    x, c = first_tokens(model, z, LEVEL, batch)
    for layer in model.layers:
        x = layer(x, c)
    sigma, data = LEVEL[:, None], CONFIG.sigma_data
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / (sigma**2 + data**2).sqrt()
    D = skip * z + out * model.norm(x)[:, 0]
    shift, scale = model.modulation.linear(torch.nn.functional.silu(c)).chunk(2, dim=-1)
    expected = model.head((1 + scale) * D + shift)
    actual = model.denoise(z, LEVEL, (0, 1), batch)
    assert actual.shape == (3, 5)
    torch.testing.assert_close(actual, expected)


def written_out(model, z, level, layers, image):
    """The module's equations, op by op in one function."""
    sigma, data = level[:, None], CONFIG.sigma_data
    c = model.condition(torch.log(level) / 4)
    patches = model.patch(patchify(image, CONFIG.patch))
    token = ((sigma**2 + data**2).rsqrt() * z)[:, None].to(patches)
    x = torch.cat([token, patches], dim=1) + model.positions
    x = run_layers([model.layers[index] for index in layers], x, c, num_queries=1)
    skip = data**2 / (sigma**2 + data**2)
    out = sigma * data / (sigma**2 + data**2).sqrt()
    D = skip * z + out * model.norm(x[:, 0])
    return model.head(model.modulation(D, c))


@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_gradients_have_the_bits_of_the_equations_written_out(autocast):
    model, batch = make_model(), make_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model.losses(DRAW, LEVEL, (0, 1), batch)
        z = add_noise(model.target(batch), torch.ones_like(LEVEL), LEVEL, DRAW)
        logits = written_out(model, z, LEVEL, (0, 1), batch["image"])
        expected = F.cross_entropy(logits.float(), batch["label"], reduction="none")
        assert torch.equal(model.denoise(z, LEVEL, (0, 1), batch), logits)
    assert torch.equal(losses, expected)
    parameters = list(model.parameters())
    grads = (torch.autograd.grad(each.mean(), parameters) for each in (losses, expected))
    assert all(map(torch.equal, *grads))


def test_the_condition_embeds_a_quarter_of_the_log_of_sigma():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 8)
    _, c = first_tokens(model, z, LEVEL, batch)
    torch.testing.assert_close(c, model.condition(torch.log(LEVEL) / 4))


def test_the_noise_level_scales_z_and_not_the_image():
    model, batch, z = make_model(), make_batch(), torch.randn(3, 8)
    low, _ = first_tokens(model, z, LEVEL, batch)
    high, _ = first_tokens(model, z, 2 * LEVEL, batch)
    assert torch.equal(low[:, 1:], high[:, 1:])
    torch.testing.assert_close(low[:, 0], c_in(LEVEL[:, None]) * z + model.positions[0])
    corner = batch["image"][:, :, :2, 2:].permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(low[:, 2], model.patch(corner) + model.positions[2])


def test_the_image_reaches_the_logits():
    model, batch = make_model(), make_batch()
    image = batch["image"].requires_grad_()
    model.denoise(torch.randn(3, 8), LEVEL, (0, 1), batch).square().sum().backward()
    assert image.grad.flatten(1).any(1).all()


def test_a_new_model_knows_nothing():
    model, batch = ViT(CONFIG), make_batch()
    logits = model.denoise(torch.randn(3, 8), LEVEL, (0, 1), batch)
    assert not logits.any()
    losses = model.losses(DRAW, LEVEL, (0, 1), batch)
    torch.testing.assert_close(losses, torch.full((3,), math.log(5)), rtol=1e-6, atol=0)


def test_a_new_model_has_unit_positions_a_small_table_and_xavier_projections():
    model = ViT(PRESETS["digits"])
    assert model.positions.std().item() == pytest.approx(1, rel=0.1)
    assert model.label_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for linear in (model.patch, model.layers[0].attention.qkv):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert not linear.bias.any()


def test_the_target_is_the_labels_row_at_unit_length():
    model, batch = make_model(), make_batch()
    z0 = model.target(batch)
    torch.testing.assert_close(z0.norm(dim=-1), torch.ones(3))
    for row, label in enumerate((4, 0, 2)):
        weight = model.label_table.weight[label]
        torch.testing.assert_close(z0[row], weight / weight.square().sum().sqrt())


def test_the_loss_moves_the_labels_row_through_z():
    model, batch = make_model(), make_batch()
    model.losses(DRAW, LEVEL, (0,), batch).sum().backward()
    moved = model.label_table.weight.grad.any(1)
    assert moved.tolist() == [True, False, True, False, True]


def kept_widths(model, layers):
    """Numbers for each sample in what autograd keeps, apart from parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() // len(LEVEL)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(DRAW, LEVEL, layers, make_batch())
    return [width for address, width in saved.items() if address not in weights]


def test_the_last_layer_keeps_of_one_token_all_but_keys_and_values():
    tokens, hidden = 5, 17  # a width like no other
    model = randomise(ViT(replace(CONFIG, mlp_hidden=hidden)))
    for layers in ((0,), (0, 1), (0, 1, 0)):
        widths = kept_widths(model, layers)
        assert widths.count(tokens * hidden) == len(layers) - 1
        assert widths.count(hidden) == 1


def test_the_last_layers_tokens_are_not_kept_for_the_one_that_answers():
    model, x = make_model(), 5 * CONFIG.dim
    fused = kept_widths(model, (0,)).count(x)
    use_baseline(model, "checkpointed")
    assert fused == kept_widths(model, (0,)).count(x) == 1


@pytest.mark.parametrize("layers", [(0,), (0, 1)])
def test_logits_and_gradients_are_those_of_all_tokens(layers):
    model, batch, z = make_model(), make_batch(), torch.randn(3, 8)

    def results():
        model.zero_grad()
        logits = model.denoise(z, LEVEL, layers, batch)
        logits.square().sum().backward()
        return logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}

    logits, gradients = results()
    use_baseline(model, "stock")
    expected, expected_gradients = results()
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-4)


def test_the_loss_is_the_cross_entropy_at_the_label_of_each_sample():
    model, batch = make_model(), make_batch()
    z = model.target(batch) + LEVEL[:, None] * normals(DRAW, 3, 8)
    logits = model.denoise(z, LEVEL, (0, 1), batch)
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    expected = -torch.stack([probability[0, 4], probability[1, 0], probability[2, 2]]).log()
    losses = model.losses(DRAW, LEVEL, (0, 1), batch)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.losses(DRAW, LEVEL, (0, 1), batch).dtype == torch.float32


def test_the_estimate_is_the_expected_unit_row():
    model = make_model()
    rows = model.label_table.weight / model.label_table.weight.norm(dim=1, keepdim=True)
    logits = torch.randn(3, 5)
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(model.estimate(logits), probability @ rows)
    torch.testing.assert_close(model.estimate(100 * torch.eye(5)), rows)
    assert model.estimate(logits.bfloat16()).dtype == torch.float32


def test_the_label_is_not_read_to_denoise():
    model, batch = make_model(), make_batch()
    image = {"image": batch["image"]}
    z = torch.randn(3, 8)
    assert torch.equal(
        model.denoise(z, LEVEL, (0, 1), image), model.denoise(z, LEVEL, (0, 1), batch)
    )


def test_norms_have_weights_only_if_asked():
    names = {"norm.weight", "norm.bias", "layers.0.norm1.weight", "layers.1.norm2.bias"}
    assert names <= set(ViT(CONFIG).state_dict())
    plain = ViT(ViTConfig(8, 2, 2, 10, 6, 4, 2, 3, 5, affine=False))
    assert not any("norm" in name for name in plain.state_dict())
