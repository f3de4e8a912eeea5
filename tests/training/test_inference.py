import math

import pytest
import torch
from models.tiny import randomise
from training.tiny import PRIOR, VIT, make_blocks, make_data

from dbkernels.ops.philox import Draw, normals

LEVELS = PRIOR.grid(4)  # three blocks serve them as 0, 1, 2, 2
LABELS = torch.tensor([2, 0, 1, 1, 0])
ASKED = {"label": LABELS}
sharings = pytest.mark.parametrize("sharing", ["joint", "copies"])


def seeded(seed=1):
    return Draw(seed, step=0)


def unit_noise(*shape):
    return normals(seeded(), shape[0], math.prod(shape[1:])).view(shape)


def ready(family, sharing="joint"):
    return randomise(make_blocks(family, sharing=sharing))


def make_images():
    return {"image": torch.randn(5, 1, 4, 4)}


def spied(blocks, monkeypatch):
    """Every evaluation: which model, its levels, its layers, its batch."""
    calls = []
    for model in {id(blocks.of(block)): blocks.of(block) for block in blocks}.values():

        def spy(z, level, layers, batch, *, model=model, denoise=model.denoise):
            calls.append((model, level, layers, batch))
            return denoise(z, level, layers, batch)

        monkeypatch.setattr(model, "denoise", spy)
    return calls


@sharings
def test_a_level_is_predicted_by_the_model_and_the_layers_that_serve_it(sharing, monkeypatch):
    blocks, batch = ready("vit", sharing), make_images()
    z = torch.randn(5, VIT.dim)
    for level, index in ((80.0, 0), (0.6, 0), (LEVELS[1], 1), (0.3, 1), (0.1, 2), (0.002, 2)):
        model = blocks.of(blocks[index])
        expected = model.denoise(z, torch.full((5,), level), (index,), batch)
        assert torch.equal(blocks.predict(batch, z, level), expected)
        assert torch.equal(blocks.denoiser(batch)(z, level), model.estimate(expected))
        with monkeypatch.context() as patch:
            patch.setattr(model, "estimate", lambda prediction: 2 * prediction)
            assert torch.equal(blocks.denoiser(batch)(z, level), 2 * expected)


@pytest.mark.parametrize("start", ["zero", "noise"])
@sharings
def test_classifying_crosses_the_blocks_that_serve_on_unit_rows(sharing, start, monkeypatch):
    blocks, batch = ready("vit", sharing), make_images()
    rows = blocks.model.label_table.weight
    rows = rows / rows.norm(dim=1, keepdim=True)
    noise = unit_noise(5, VIT.dim) * (80**2 + VIT.sigma_data**2) ** 0.5
    z = noise if start == "noise" else torch.zeros_like(noise)
    models = [blocks.of(blocks[index]) for index in (0, 1, 2, 2)]
    expected = []
    for index, model, level, then in zip(
        (0, 1, 2, 2), models, LEVELS, [*LEVELS[1:], 0], strict=True
    ):
        logits = model.denoise(z, torch.full((5,), level), (index,), batch)
        expected.append(logits)
        z = then / level * z + (1 - then / level) * logits.softmax(-1) @ rows
    calls = spied(blocks, monkeypatch)
    actual = blocks.predictions(batch, LEVELS, seeded(), start=start)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # each level is evaluated once
    assert [layers for _, _, layers, _ in calls] == [(0,), (1,), (2,), (2,)]
    assert [id(model) for model, *_ in calls] == [id(model) for model in models]
    # it does not read labels and keeps no graph
    again = blocks.predictions({**batch, "label": LABELS % 3}, LEVELS, seeded(), start=start)
    assert all(map(torch.equal, again, actual))
    assert not any(each.requires_grad for each in actual)


def test_an_answer_starts_from_zero_and_has_no_chance_in_it():
    blocks, batch = ready("vit"), make_images()
    answers = [blocks.predictions(batch, LEVELS, seeded(s)) for s in (1, 2)]
    assert all(map(torch.equal, *answers))
    drawn = [blocks.predictions(batch, LEVELS, seeded(s), start="noise") for s in (1, 2)]
    assert not any(map(torch.equal, *drawn))


def test_several_starts_answer_with_the_mean_of_their_probabilities():
    blocks, batch = ready("vit"), make_images()
    alone = [blocks.predictions(batch, LEVELS, Draw(1, step=k), start="noise") for k in range(3)]
    together = blocks.predictions(batch, LEVELS, seeded(), start="noise", starts=3)
    for step, answer in enumerate(together):
        mean = torch.stack([found[step].softmax(-1) for found in alone]).mean(0)
        torch.testing.assert_close(answer.softmax(-1), mean)
    # each start has noise of its own
    assert not torch.allclose(together[0], alone[0][0], atol=1e-3)


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("vit", {"start": "one"}, "start must be one of zero, noise, got one"),
        ("vit", {"starts": 2}, "starts must be 1 from zero, got 2"),
        ("vit", {"start": "noise", "starts": 0}, "starts must be"),
        ("vit", {"start": "noise", "starts": 1001}, "starts must be"),
        ("dit", {"start": "noise", "starts": 2}, "starts must be 1 for DiT, got 2"),
    ],
)
def test_rejects_starts_that_do_not_fit(family, options, message):
    blocks = ready(family)
    for call in (
        lambda: blocks.predictions({**ASKED, **make_images()}, LEVELS, seeded(), **options),
        lambda: blocks.evaluate(make_data(), **options),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_guidance_extrapolates_from_no_label_to_the_label():
    blocks, level = ready("dit"), 2.0
    z = unit_noise(5, 1, 4, 4) * (level**2 + 0.25) ** 0.5
    sigma = torch.full((5,), level)
    conditional, unconditional = (
        blocks.model.denoise(z, sigma, (0,), {"label": label})
        for label in (LABELS, torch.full_like(LABELS, 3))
    )
    actual = blocks.sample(ASKED, [level], seeded(), guidance=2.5)
    torch.testing.assert_close(actual, unconditional + 2.5 * (conditional - unconditional))
    assert not torch.allclose(conditional, unconditional, atol=1e-2)


@sharings
@pytest.mark.parametrize(
    ("sampler", "served"),
    [
        ("euler", [0, 1, 2, 2]),
        ("heun", [0, 1, 1, 2, 2, 2, 2]),
        ("dpmpp_2m", [0, 1, 2, 2]),
    ],
)
@pytest.mark.parametrize("guidance", [1, 1.0, 2.0])
def test_samplers_ask_the_serving_block_and_once_more_without_a_label_where_guided(
    sharing, sampler, served, guidance, monkeypatch
):
    blocks = ready("dit", sharing)
    calls = spied(blocks, monkeypatch)
    blocks.sample(ASKED, LEVELS, seeded(), guidance=guidance, sampler=sampler)
    times = 1 if guidance == 1 else 2
    assert [layers for _, _, layers, _ in calls] == [(i,) for i in served for _ in range(times)]
    assert all(model is blocks.of(blocks[i]) for model, _, (i,), _ in calls)
    labels = [batch["label"].tolist() for *_, batch in calls]
    assert labels.count(LABELS.tolist()) == len(served)
    assert labels.count([3] * 5) == len(labels) - len(served)


def test_the_same_seed_gives_the_same_images_and_another_seed_others():
    blocks = ready("dit")
    first, second, other = (blocks.sample(ASKED, LEVELS, seeded(s)) for s in (1, 1, 2))
    assert first.shape == (5, 1, 4, 4) and first.dtype == torch.float32
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert not first.requires_grad
    last = blocks.sample({"label": LABELS[3:]}, LEVELS, Draw(1, step=0, sample=3))
    torch.testing.assert_close(last, first[3:])
    assert blocks.sample({"label": LABELS[:0]}, LEVELS, seeded()).shape == (0, 1, 4, 4)


@pytest.mark.parametrize(
    ("family", "batch", "levels", "options", "message"),
    [
        ("dit", [0, 3], LEVELS, {}, "labels must be 0 to 2, got 0 to 3"),
        ("dit", [-1, 2], LEVELS, {}, "labels must be 0 to 2, got -1 to 2"),
        (
            "dit",
            [0],
            LEVELS,
            {"sampler": "rk4"},
            "one of euler, heun, dpmpp_2m, got rk4",
        ),
        ("dit", [0], [81.0, 1.0], {}, r"level must lie in \[0.002, 80.0\], got 81"),
        ("dit", [0], [1.0, 2.0], {}, "levels must be descending and on the path"),
        ("vit", [0], LEVELS, {"guidance": 2}, "guidance must be 1 for ViT, got 2"),
    ],
)
def test_rejects(family, batch, levels, options, message):
    batch = {"label": torch.tensor(batch), "image": torch.zeros(len(batch), 1, 4, 4)}
    with pytest.raises(ValueError, match=message):
        ready(family).sample(batch, levels, seeded(), **options)
