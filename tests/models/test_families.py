"""The equations of each family written out, its new weights, and what it alone has."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import (
    CONFIGS,
    DRAW,
    LEVEL,
    SCALE,
    every_family,
    image_families,
    levels_of,
    make_batch,
    make_model,
    noisy,
    randomise,
)

from dbkernels.diffusion.prediction import EDM
from dbkernels.models import FAMILIES, ViT
from dbkernels.models.baseline import use_baseline
from dbkernels.models.embed import grid_positions, patchify, unpatchify
from dbkernels.models.layer import run_layers
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import adaln_norm, add_noise, linear_cross_entropy, score_loss, uniforms
from dbkernels.ops.table_rows import table_rows


def edm(data, shape=(3, 1)):
    """What z and the network's answer are multiplied by, of Karras et al. 2022, table 1."""
    sigma = LEVEL.view(shape)
    total = sigma**2 + data**2
    return total.rsqrt(), data**2 / total, sigma * data / total.sqrt()


def vit(model, batch):
    """The prediction at the drawn noise and the loss, op by op in one function."""
    (c_in, c_skip, c_out), z = edm(model.sigma_data), noisy(model, batch)
    c = model.condition(torch.log(LEVEL) / 4)
    patches = model.patch(patchify(batch["image"], 2))
    x = torch.cat([(c_in * z)[:, None].to(patches), patches], dim=1) + model.positions
    x = run_layers(model.layers, x, c, num_queries=1)
    D = c_skip * z + c_out * model.norm(x[:, 0])
    logits = model.head(model.modulation(D, c))
    losses = F.cross_entropy(logits.float(), batch["label"], reduction="none")
    return logits, (SCALE * losses).sum()


def dit(model, batch):
    """As `vit`."""
    image, z, prediction = batch["image"], noisy(model, batch), EDM(model.sigma_data)
    c_in, c_skip, c_out = edm(model.sigma_data, (3, 1, 1, 1))

    def network(scaled):
        c = model.condition(torch.log(LEVEL) / 4) + model.label_table(batch["label"])
        x = model.patch(patchify(scaled, 2)) + grid_positions(3, 8)
        x = run_layers(model.layers, x, c)
        shift, scale = model.modulation.linear(F.silu(c)).chunk(2, dim=-1)
        return unpatchify(model.head(adaln_norm(x, scale, shift, dtype=scale.dtype)), 2, 3)

    exact = LEVEL.double()
    target = (each.float() for each in prediction.target(exact))
    scaled = add_noise(image, *(each.float() for each in prediction.input(exact)), DRAW)
    weight = (SCALE * prediction.estimate(exact)[1].square()).float()
    loss, _ = score_loss(network(scaled), image, *target, DRAW, weight=weight, reduction="sum")
    return c_skip * z + c_out * network(c_in * z), loss


def mdm(model, batch):
    """As `vit`."""
    token, (level, _) = batch["token"], levels_of(model)
    masked = uniforms(DRAW.nth(-1), 3, 7) < level[:, None]
    c = model.condition(1000 * level)
    x = table_rows(model.table.weight, token.masked_fill(masked, 5))
    x = run_layers(model.layers, x, c, rotary_table(torch.arange(7), 4))
    shift, scale = model.modulation.linear(F.silu(c)).chunk(2, dim=-1)
    x = adaln_norm(x, scale, shift, norm="rms", dtype=scale.dtype)
    head = {"bias": model.head.bias, "token_weight": masked * (SCALE / 7)[:, None]}
    loss = linear_cross_entropy(x, model.head.weight, token, **head, reduction="sum")
    return model.head(x), loss


def huginn(model, batch):
    """As `vit`."""
    token, z = batch["token"], noisy(model, batch)
    (c_in, c_skip, c_out), rotary = edm(0.7, (3, 1, 1)), rotary_table(torch.arange(7), 4)
    constant = model.clean_condition
    e = table_rows(model.clean_table.weight, F.pad(token[:, :-1], (1, 0), value=5))
    e = run_layers(model.layers[:1], e, constant.expand(3, -1), rotary, attention="causal")
    c = model.condition(torch.log(LEVEL) / 4)
    c = c + constant.to(c.dtype)
    x = (model.from_state(c_in * z) + model.from_tokens(e)).to(e.dtype)
    h = run_layers(model.layers[1:], x, c, rotary, attention="causal")
    shift, scale = model.head.modulation.linear(F.silu(c))[:, None].chunk(2, dim=-1)
    rows = (1 + scale) * (c_skip * z + c_out * model.head.norm(h)) + shift
    return model.head.linear(rows), of_words(rows, model.head.linear, token)


def of_words(rows, head, token):
    """The sum of each sample's mean cross-entropy times its scale."""
    told = {"bias": head.bias, "token_weight": (SCALE / 7)[:, None].expand(3, 7)}
    return linear_cross_entropy(rows, head.weight, token, **told, reduction="sum")


def ar(model, batch):
    """As `vit`."""
    token, z, rotary = batch["token"], noisy(model, batch), rotary_table(torch.arange(7), 4)
    c_in, c_skip, c_out = edm(0.7, (3, 1, 1))
    c = model.condition(torch.log(LEVEL) / 4)
    clean = table_rows(model.clean_table.weight, F.pad(token[:, :-1], (1, 0), value=5))
    x = torch.cat([(c_in * z).to(clean.dtype), clean])
    both = torch.cat([c, model.clean_condition.to(c.dtype).expand(3, -1)])
    h = run_layers(model.layers, x, both, rotary, attention="two_stream", num_samples=3)
    shift, scale = model.head.modulation.linear(F.silu(both[:3, None])).chunk(2, dim=-1)
    rows = (1 + scale) * (c_skip * z + c_out * model.head.norm(h)) + shift
    return model.head.linear(rows), of_words(rows, model.head.linear, token)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("equations", [vit, dit, mdm, ar, huginn])
def test_predictions_loss_and_gradients_have_the_bits_of_the_equations(equations, autocast):
    model = make_model(equations.__name__)
    batch, parameters = make_batch(model), list(model.parameters())
    level, interval = levels_of(model)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, expected_loss = equations(model, batch)
        actual = model.denoise(noisy(model, batch), level, range(3), batch)
        loss = model.loss(DRAW, level, SCALE, range(3), batch, interval)
        losses = model.losses(DRAW, level, range(3), batch)
    torch.testing.assert_close(loss, (SCALE * losses).sum())
    assert torch.equal(actual, expected) and torch.equal(loss, expected_loss)
    grads = (torch.autograd.grad(each, parameters) for each in (loss, expected_loss))
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize(
    ("family", "preset", "count"),
    [
        ("vit", "cifar100", 10_529_095),
        ("vit", "tiny-imagenet", 92_979_144),
        ("dit", "S/2", 32_858_896),
        ("dit", "B/2", 130_303_504),
        ("dit", "L/2", 457_824_272),
        ("dit", "XL/2", 674_816_272),
    ],
)
def test_the_published_models_have_as_many_parameters(family, preset, count):
    with torch.device("meta"):
        model = FAMILIES[family].model.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == count


@every_family
def test_a_new_network_says_nothing(family):
    model = FAMILIES[family].model(CONFIGS[family])
    batch = make_batch(model)
    z, (level, _) = noisy(model, batch), levels_of(model)
    words = {"vit": (3, 5), "mdm": (3, 7, 5), "ar": (3, 7, 5), "huginn": (3, 7, 5)}
    if family in words:
        expected = torch.zeros(words[family])
    else:
        of_z, _ = model.prediction.estimate(level.view(3, 1, 1, 1))
        expected = of_z * z
    actual = model.denoise(z, level, range(3), batch)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=0)


@image_families
def test_new_weights_are_a_small_table_and_xavier_projections(family):
    model = FAMILIES[family].model.from_preset("digits")
    assert model.label_table.weight.std().item() == pytest.approx(0.02, rel=0.1)
    for linear in (model.patch, model.layers[0].attention.qkv, model.layers[0].mlp.fc1):
        bound = math.sqrt(6 / sum(linear.weight.shape))
        assert linear.weight.abs().max().item() == pytest.approx(bound, rel=0.05)
        assert not linear.bias.any()
    if family == "vit":
        assert model.positions.std().item() == pytest.approx(1, rel=0.1)


# what a vit alone has


def test_target_and_estimate_are_rows_of_unit_length():
    model = make_model("vit")
    rows = model.label_table.weight / model.label_table.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(model.target(make_batch(model)), rows[[3, 0, 2]])
    logits = torch.randn(3, 5)
    probability = logits.exp() / logits.exp().sum(1, keepdim=True)
    torch.testing.assert_close(model.estimate(logits), probability @ rows)


def kept_widths(model, layers):
    """Numbers for each sample in what autograd keeps, apart from parameters."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes() // tensor.element_size() // len(LEVEL)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.losses(DRAW, LEVEL, layers, make_batch(model))
    return [width for address, width in saved.items() if address not in weights]


def test_the_last_layer_keeps_of_one_token_all_but_keys_and_values():
    tokens, hidden = 5, 17  # a width like no other
    model = randomise(ViT(replace(CONFIGS["vit"], mlp_hidden=hidden)))
    for layers in ((0,), (0, 1), (0, 1, 0)):
        widths = kept_widths(model, layers)
        assert widths.count(tokens * hidden) == len(layers) - 1
        assert widths.count(hidden) == 1


def test_the_last_layers_tokens_are_not_kept_for_the_one_that_answers():
    model, x = make_model("vit"), 5 * CONFIGS["vit"].dim
    fused = kept_widths(model, (0,)).count(x)
    use_baseline(model, "checkpointed")
    assert fused == kept_widths(model, (0,)).count(x) == 1


def test_norms_have_weights_only_if_asked():
    names = {"norm.weight", "norm.bias", "layers.0.norm1.weight", "layers.1.norm2.bias"}
    assert names <= set(ViT(CONFIGS["vit"]).state_dict())
    plain = ViT(replace(CONFIGS["vit"], affine=False))
    assert not any("norm" in name for name in plain.state_dict())


# what a dit alone has


def test_the_target_is_the_image_and_the_estimate_the_prediction():
    model = make_model("dit")
    batch, prediction = make_batch(model), torch.randn(3, 3, 6, 6)
    assert model.target(batch) is batch["image"] and model.estimate(prediction) is prediction


def test_the_unconditional_batch_uses_the_last_row():
    model = make_model("dit")
    batch = {**make_batch(model), "mask": torch.ones(3)}
    without = model.unconditional(batch)
    assert without["label"].tolist() == [4, 4, 4] and without["label"].dtype == torch.int64
    assert FAMILIES["dit"].guided
    assert without["image"] is batch["image"] and without["mask"] is batch["mask"]
    assert batch["label"].tolist() == [3, 0, 2]
    model.denoise(torch.randn(3, 3, 6, 6), LEVEL, (0,), without).sum().backward()
    assert model.label_table.weight.grad.any(1).tolist() == [False] * 4 + [True]
