"""What every family promises, and a model that is of none of ours."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from models.tiny import (
    DRAW,
    SCALE,
    every_family,
    levels_of,
    make_batch,
    make_model,
    noisy,
    randomise,
)
from torch import nn
from training.tiny import PRIOR

from dbkernels.data.dataset import as_data
from dbkernels.diffusion.path import EXPLODING, log_level
from dbkernels.diffusion.prediction import EDM
from dbkernels.diffusion.samplers import euler, heun
from dbkernels.models import AdaLNLayer, LayerConfig
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import add_noise
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

# what is read of a batch beside z
CONDITION = {
    "vit": ["image"], "dit": ["label"], "mmdit": ["text", "pooled"],
    "mdm": ["token"], "ar": ["token"], "huginn": ["token"],
}  # fmt: skip
# layers that a family parts, where the first reads something else, or streams become one or two
BETWEEN = {"huginn": [(0, 1)], "mmdit": [(1, 2), (2, 0)]}
# one that uses all that is shared: a joint layer that is the last leaves the text alone
LAST = {"mmdit": 2}


@pytest.fixture
def made(family):
    model = make_model(family)
    return model, make_batch(model), *levels_of(model)


@every_family
@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 0), (1, 1, 1), ()])
def test_layers_run_in_the_order_that_was_asked_each_on_the_last_ones_output(made, family, layers):
    (model, batch, level, _), calls = made, []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(
            lambda _, args, out, i=index: calls.append(
                (i, args[0], out[0] if isinstance(out, tuple) else out)
            )
        )
    model.denoise(noisy(model, batch), level, layers, batch)
    assert tuple(index for index, _, _ in calls) == layers
    for (first, _, given), (second, taken, _) in pairwise(calls):
        assert (taken is given) == ((first, second) not in BETWEEN.get(family, []))


@every_family
def test_gradients_stay_in_the_layers_that_ran_and_in_what_is_shared(made, family):
    (model, batch, level, interval), ran = made, LAST.get(family, 1)
    model.loss(DRAW, level, SCALE, (ran,), batch, interval).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("layers.") and not name.startswith(f"layers.{ran}."):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@every_family
@pytest.mark.parametrize("autocast", [False, True])
def test_loss_and_estimate_have_the_shapes_and_dtypes_of_the_protocol(made, autocast):
    model, batch, level, interval = made
    z = noisy(model, batch)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        prediction = model.denoise(z, level, range(3), batch)
        losses = model.losses(DRAW, level, range(3), batch)
        loss = model.loss(DRAW, level, SCALE, range(3), batch, interval)
    estimate = model.estimate(prediction)
    assert losses.shape == (3,) and loss.shape == () and (losses > 0).all()
    assert z.shape == model.z_shape(batch) == model.target(batch).shape
    # of tokens a probability for each that there is
    words = () if z.is_floating_point() else (model.config.vocabulary,)
    assert estimate.shape == (*z.shape, *words)
    assert {t.dtype for t in (losses, loss, estimate)} == {torch.float32}


@every_family
def test_only_z_and_the_condition_are_read_to_denoise(made, family):
    model, batch, level, _ = made
    alone, z = {name: batch[name] for name in CONDITION[family]}, noisy(model, batch)
    expected = model.denoise(z, level, range(3), batch)
    assert torch.equal(model.denoise(z, level, range(3), alone), expected)
    assert model.z_shape(alone) == z.shape and model.level_shape(alone) == level.shape


@every_family
def test_samples_do_not_see_each_other(made):
    model, batch, level, _ = made
    z = noisy(model, batch)
    predictions = model.denoise(z, level, range(3), batch)
    moved = model.denoise(z[[1, 0, 2]], level, range(3), batch)
    same = [torch.equal(*each) for each in zip(moved, predictions, strict=True)]
    assert same == [False, False, True]
    together = model.losses(DRAW, level, range(3), batch)
    for i in range(3):
        alone, own = {name: t[i : i + 1] for name, t in batch.items()}, level[i : i + 1]
        losses = model.losses(replace(DRAW, sample=i), own, range(3), alone)
        torch.testing.assert_close(losses, together[i : i + 1])
        one = model.denoise(z[i : i + 1], own, range(3), alone)
        torch.testing.assert_close(one[0], predictions[i], rtol=1e-4, atol=1e-5)


@every_family
def test_the_target_is_made_by_the_target_parts_alone(made):
    model, batch, _, _ = made
    before = model.target(batch)
    children = dict(model.named_children())
    assert set(model.target_parts) <= set(children)
    for name, child in children.items():
        if name not in model.target_parts:
            randomise(child)
    assert torch.equal(model.target(batch), before)
    for name in model.target_parts:
        randomise(children[name])
        assert not torch.equal(model.target(batch), before)


class Recurrent(nn.Module):
    """Prelude, core and coda over tokens; the core is run as often as a block's layers say."""

    target_parts, stem_and_head, sigma_data, independent = ("table",), (), 0.5, True
    prediction = EDM(0.5)

    def __init__(self, words=5, D=16):
        super().__init__()
        self.table, self.stem = nn.Embedding(words, D), nn.Embedding(words, D)
        self.condition = NoiseEmbedding(8)
        layer = LayerConfig(D, 2, 32, 8, norm="rms", mlp="swiglu", bias=False)
        self.layers = nn.ModuleList(AdaLNLayer(layer) for _ in range(3))
        self.norm, self.head = nn.RMSNorm(D), nn.Linear(D, words)

    def rows(self):
        return F.normalize(self.table.weight, dim=-1)

    def target(self, batch):
        return self.rows()[batch["answer"]]

    def denoise(self, z, level, layers, batch):
        c, sigma = self.condition(log_level(level)), level[:, None, None]
        p, (of_z, of_F) = EDM(0.5).scale(sigma), EDM(0.5).estimate(sigma)
        rotary = rotary_table(torch.arange(z.shape[1], device=z.device), 8)
        x = p * z + self.stem(batch["token"])
        for index in layers:
            x = self.layers[index](x, c, rotary)
        return self.head(of_z * z + of_F * self.norm(x))

    def level_shape(self, batch):
        return (len(batch["token"]),)

    def loss(self, draw, level, scale, layers, batch, interval):
        z = add_noise(self.target(batch), torch.ones_like(level), level, draw)
        logits = self.denoise(z, level, layers, batch)
        losses = F.cross_entropy(logits.mT, batch["answer"], reduction="none").mean(1)
        return (scale * losses).sum()

    def estimate(self, prediction):
        return prediction.softmax(-1) @ self.rows()


# words, each to be answered by the word after it in the alphabet
WORDS = torch.randint(5, (12, 6), generator=torch.Generator().manual_seed(4))
SENTENCES = [{"token": words, "answer": (words + 1) % 5} for words in WORDS]


@pytest.mark.parametrize(
    ("num_blocks", "groups"), [(1, {"block0"}), (2, {"block0", "block1", "shared"})]
)
def test_a_recurrent_stack_is_trained_and_sampled_unchanged(num_blocks, groups):
    how = {"process": PRIOR, "weighting": "none", "layers": [0, 1, 1, 1, 2]}
    blocks, data = DiffusionBlocks(Recurrent(), num_blocks, **how), as_data(SENTENCES)
    trainer = Trainer(blocks, data, steps=60 // num_blocks, batch_size=8, lr=2e-2, ema=0.5)
    trainer.run()
    assert set(trainer.counters()["groups"]) == groups
    if num_blocks == 2:
        assert "model.layers.1.mlp.fc1.weight" in trainer.groups["shared"].parameters
    batch = data.batch(torch.arange(12))
    z = PRIOR.start(torch.randn(12, 6, 16), 80.0, 0.5)
    # heun's correction magnifies errors by the ratio of neighbouring levels
    halving = [80 / 2**i for i in range(11)]
    with torch.no_grad():
        for sampler, levels in ((euler, PRIOR.grid(4)), (heun, halving)):
            answer = sampler(blocks.eval().denoiser(batch), z, levels, EXPLODING)
            word = (answer @ blocks.model.rows().T).argmax(-1)
            assert (word == batch["answer"]).float().mean() > 0.9
