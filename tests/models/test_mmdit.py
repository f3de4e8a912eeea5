"""The network of images and texts: its equations, what it reads, and what it refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models.tiny import CONFIGS, DRAW, SCALE, levels_of, make_batch, noisy, randomise
from training.tiny import make_trainer, weights

from dbkernels.data.augment import drop_conditions
from dbkernels.models import MMDiT
from dbkernels.models.embed import patchify, unpatchify
from dbkernels.models.mmdit import prompts
from dbkernels.models.rotary import axis_table
from dbkernels.ops import adaln_norm, add_noise, reference, score_loss

CONFIG = replace(CONFIGS["mmdit"], dim=16)  # heads of two wavelengths along each axis
S = CONFIG.text_length
TOGETHER, ALONE = (0, 1), 2  # its layers


@pytest.fixture
def made():
    model = randomise(MMDiT(CONFIG))
    return model, make_batch(model), levels_of(model)[0]


def network(model, z, level, layers, batch):
    """F of a flow, each layer with both streams apart before and after it."""
    c = model.condition(1000 * level) + model.pooled(batch["pooled"])
    x, text = model.patch(patchify(z, 2)), model.text(batch["text"])
    places = [(0, 0)] * S + [(row, column) for row in range(3) for column in range(3)]
    rotary = axis_table(torch.tensor(places), 8)
    for index in layers:
        if index in TOGETHER:
            x, text = model.layers[index](x, text, c, rotary)
        else:
            both = model.layers[index](torch.cat([text, x], 1), c, rotary)
            text, x = both[:, :S], both[:, S:]
    shift, scale = model.modulation.linear(F.silu(c)).chunk(2, dim=-1)
    return unpatchify(model.head(adaln_norm(x, scale, shift, dtype=scale.dtype)), 2, 3)


def equations(model, level, layers, batch):
    """The denoised image and the loss, in the order of their rounding."""
    z, exact, image = noisy(model, batch), level.double(), batch["image"]
    denoised = z - level[:, None, None, None] * network(model, z, level, layers, batch)
    a, minus = (1 - exact).float(), torch.full_like(level, -1)
    answer = network(model, add_noise(image, a, level, DRAW), level, layers, batch)
    weight = (SCALE * exact.square()).float()
    told = {"weight": weight, "reduction": "sum"}
    return denoised, score_loss(answer, image, minus, -minus, DRAW, **told)[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 0), (0, 2, 1, 2), (2,), ()])
def test_prediction_loss_and_gradients_have_the_bits_of_the_equations(made, layers, autocast):
    (model, batch, level), parameters = made, list(made[0].parameters())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, expected_loss = equations(model, level, layers, batch)
        actual = model.denoise(noisy(model, batch), level, layers, batch)
        loss = model.loss(DRAW, level, SCALE, layers, batch, levels_of(model)[1])
    assert torch.equal(actual, expected) and torch.equal(loss, expected_loss)
    found, wanted = (
        torch.autograd.grad(each, parameters, allow_unused=True) for each in (loss, expected_loss)
    )
    for a, b in zip(found, wanted, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_each_axis_turns_its_own_part_of_the_pairs():
    places, width = torch.tensor([[0, 0], [3, 0], [0, 5], [2, 7]]), 12
    angles = torch.tensor(
        [[place[i // 3] * 10000 ** (-(i % 3) / 3) for i in range(6)] * 2 for place in places]
    )
    expected = torch.stack([angles.cos(), angles.sin()])
    torch.testing.assert_close(axis_table(places, width), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="3 axes need a head width that 6 divides, got 8"):
        axis_table(torch.zeros(4, 3), 8)


def test_attention_sees_how_far_places_lie_apart_and_not_where_they_are():
    q, k = torch.randn(2, 1, 4, 1, 12)
    places = torch.tensor([[0, 0], [3, 1], [0, 5], [2, 7]])

    def scores(places):
        turned = (reference.rotate(t, axis_table(places, 12)).squeeze(2) for t in (q, k))
        return torch.einsum("bqd,bkd->bqk", *turned)

    same = scores(places + torch.tensor([4, 9]))
    torch.testing.assert_close(same, scores(places), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(scores(places.flip(1)), scores(places), atol=1e-2)


def test_a_text_has_no_order_and_an_image_has(made):
    model, batch, level = made
    z = noisy(model, batch)
    denoised = model.denoise(z, level, range(3), batch)
    turned = {**batch, "text": batch["text"].roll(2, 1)}
    torch.testing.assert_close(model.denoise(z, level, range(3), turned), denoised)
    moved = model.denoise(z.roll(2, 3), level, range(3), batch).roll(-2, 3)
    assert not torch.allclose(moved, denoised, atol=1e-2)
    # rows and columns are two things
    other = model.denoise(z.mT.contiguous(), level, range(3), batch).mT
    assert not torch.allclose(other, denoised, atol=1e-2)


@pytest.mark.parametrize("name", ["text", "pooled"])
@pytest.mark.parametrize("layers", [(0, 1), (2,)])
def test_what_is_known_of_a_text_changes_its_own_image_alone(made, name, layers):
    model, batch, level = made
    other = {**batch, name: batch[name].clone()}
    other[name][1] += 1
    denoised = [model.denoise(noisy(model, batch), level, layers, b) for b in (batch, other)]
    same = [torch.equal(*each) for each in zip(*denoised, strict=True)]
    assert same == [True, False, True]


def test_without_embeddings_of_all_the_text_none_are_asked_for_or_read(made):
    _, batch, level = made
    model = randomise(MMDiT(replace(CONFIG, pooled_dim=0)))
    assert set(model.config.fields()) == {"image", "text"}
    assert not any("pooled" in name for name in model.state_dict())
    alone = {"text": batch["text"]}
    denoised = [model.denoise(noisy(model, batch), level, range(3), b) for b in (batch, alone)]
    assert torch.equal(*denoised)


def test_the_unconditional_batch_has_zeros_and_the_rest_as_it_was(made):
    model, batch, _ = made
    batch["mask"], before = torch.ones(3), batch["text"].clone()
    without = model.unconditional(batch)
    assert without.keys() == batch.keys()
    for name in ("text", "pooled"):
        assert not without[name].any() and without[name].shape == batch[name].shape
    assert without["image"] is batch["image"] and without["mask"] is batch["mask"]
    assert torch.equal(batch["text"], before) and before.any()


def test_a_text_is_dropped_whole(made):
    batch = {name: torch.cat([t] * 20) for name, t in made[1].items()}
    dropped = drop_conditions(batch, DRAW, share=0.5, unconditional=made[0].unconditional)
    gone = [~dropped[name].flatten(1).any(1) for name in ("text", "pooled")]
    assert torch.equal(*gone) and 15 < gone[0].sum() < 45
    assert torch.equal(dropped["text"][~gone[0]], batch["text"][~gone[0]])


def test_a_joint_layer_that_is_the_last_trains_of_the_text_its_keys_and_values_alone(made):
    model, batch, level = made
    for layers, whole in (((0, 1), False), ((1, 2), True)):
        model.zero_grad()
        model.loss(DRAW, level, SCALE, layers, batch, levels_of(model)[1]).backward()
        text = model.layers[1].context
        q, k, v = (part.any().item() for part in text.attention.qkv.weight.grad.chunk(3))
        modulated = [part.any().item() for part in text.modulation.weight.grad.chunk(6)]
        assert (q, k, v) == (whole, True, True) and modulated == [True] * 2 + [whole] * 4
        for projection in (text.attention.out, text.mlp.fc1, text.mlp.fc2):
            assert projection.weight.grad.any() == projection.bias.grad.any() == whole


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_what_has_no_gradient_there_is_moved_by_the_decay_alone(decay):
    trainer = make_trainer("mmdit", weight_decay=decay, lr=1e-2)  # a layer to a block
    randomise(trainer.blocks.model)
    before = weights(trainer)
    trainer.step_block(trainer.blocks[0])
    names = [f"model.layers.0.context.{name}.weight" for name in ("attention.out", "mlp.fc2")]
    for name in names:
        expected = before[name] * (1 - 1e-2 * decay)
        torch.testing.assert_close(weights(trainer)[name], expected, rtol=1e-6, atol=0)
    qkv = "model.layers.0.context.attention.qkv.weight"
    assert not torch.allclose(weights(trainer)[qkv], before[qkv] * (1 - 1e-2 * decay), atol=1e-4)


@pytest.mark.parametrize(
    ("preset", "billions", "count"),
    [("flux-12b", 11.9, 11_891_178_560), ("dit-32b", 32.4, 32_603_272_832)],
)
def test_presets_have_about_as_many_parameters_as_what_they_are_named_for(preset, billions, count):
    with torch.device("meta"):
        model = MMDiT.from_preset(preset)
    assert sum(p.numel() for p in model.parameters()) == count
    assert count == pytest.approx(billions * 1e9, rel=0.01)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({"dim": 3072}, (57, 38)),
        ({"depth": 3}, (3, 2)),
        ({"depth": 1}, (1, 0)),
        ({"depth": 6, "parallel": 6}, (6, 6)),
        ({"parallel": 0}, (57, 0)),
    ],
    ids=str,
)
def test_fewer_layers_have_fewer_parallel_ones_in_proportion(sizes, expected):
    config = MMDiT.preset("flux-12b").resized(sizes)
    assert (config.depth, config.parallel) == expected


def test_layers_are_joint_and_then_parallel():
    for parallel in range(4):
        layers = MMDiT(replace(CONFIG, parallel=parallel)).layers
        kinds = [type(layer).__name__ for layer in layers]
        assert kinds == ["JointLayer"] * (3 - parallel) + ["ParallelLayer"] * parallel


def test_every_prompt_is_asked_for_as_often_as_is_said(tmp_path):
    text = np.random.default_rng(0).normal(size=(2, S, 7)).astype(np.float16)
    pooled = np.arange(12, dtype=np.float32).reshape(2, 6)
    np.savez(tmp_path / "p.npz", text=text, pooled=pooled)
    found = prompts(CONFIG, tmp_path / "p.npz", 3, "cpu")
    assert list(found) == ["text", "pooled"]
    assert found["pooled"].tolist() == np.repeat(pooled, 3, axis=0).tolist()
    assert torch.equal(found["text"], torch.from_numpy(np.repeat(text, 3, axis=0)).float())


NOTHING = np.zeros((2, S, 7), np.float32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"parallel": 4}, "parallel must be from 0 to depth 3, got 4"),
        ({"parallel": -1}, "parallel must be from 0 to depth 3, got -1"),
        ({"text_length": 0}, "text_length must be at least 1, got 0"),
        ({"text_dim": 0}, "text_dim must be at least 1, got 0"),
        ({"pooled_dim": -1}, "pooled_dim must be at least 0, got -1"),
        ({"num_heads": 8}, "a head must have a width that 4 divides, .*, got 16 / 8"),
        ({"prediction": "edm"}, "prediction of flow must be one of velocity, x0, got edm"),
        ({"patch": 4}, "the patch must divide the image size, got 4 and 6"),
        (None, "prompts must be an .npz of embeddings for a model of images and texts, got none"),
        ({"text": NOTHING}, "must have text and pooled, as the model is made for, got text"),
        (
            {"text": NOTHING[:, 1:], "pooled": NOTHING[:, 0, 1:]},
            r"text of .* must be \(N, 5, 7\), as the model is made for, got \(N, 4, 7\)",
        ),
        (
            {"text": NOTHING, "pooled": NOTHING[:, 0, 2:]},
            r"pooled of .* must be \(N, 6\), as the model is made for, got \(N, 5\)",
        ),
    ],
    ids=lambda given: None if isinstance(given, str) else "-".join(given or ["none"]),
)
def test_rejects(tmp_path, call, message):
    file = tmp_path / "p.npz"
    with pytest.raises(ValueError, match=message):
        if call is None:
            CONFIG.prompts(None, "cpu")
        elif "text" in call:
            np.savez(file, **call)
            CONFIG.prompts(file, "cpu")
        else:
            replace(CONFIG, **call)
