import copy
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise
from torch import nn
from training.tiny import DIT, PRIOR, VIT

from dbkernels.diffusion.prediction import EDM, log_level
from dbkernels.diffusion.samplers import euler, heun
from dbkernels.models import FAMILIES, AdaLNLayer, LayerConfig
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.rotary import rotary_table
from dbkernels.ops import Draw, add_noise
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import partition
from dbkernels.training.trainer import Trainer

LEVEL = torch.tensor([0.01, 0.4, 2.0, 60.0])
DRAW = Draw(seed=3, step=1)
both = pytest.mark.parametrize("family", ["vit", "dit"])


def make_model(family):
    return randomise(FAMILIES[family].model({"vit": VIT, "dit": DIT}[family]))


def make_batch():
    return {"image": torch.randn(4, 1, 4, 4), "label": torch.tensor([2, 0, 1, 1])}


def noisy(model, batch):
    return add_noise(model.target(batch), torch.ones_like(LEVEL), LEVEL, DRAW)


@both
def test_two_halves_in_one_call_are_the_whole_network(family):
    model, batch = make_model(family), make_batch()
    first, second = (block.layers for block in partition(3, 2, PRIOR))
    z = noisy(model, batch)
    whole = model.denoise(z, LEVEL, range(3), batch)
    assert torch.equal(model.denoise(z, LEVEL, (*first, *second), batch), whole)
    for half in (first, second):
        assert not torch.allclose(model.denoise(z, LEVEL, half, batch), whole, atol=1e-3)


@both
@pytest.mark.parametrize("layers", [(0, 1, 2), (2, 0), (1, 1, 1), ()])
def test_layers_run_in_the_order_that_was_asked_each_on_the_last_ones_output(family, layers):
    model, batch, calls = make_model(family), make_batch(), []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda _, args, out, i=index: calls.append((i, args[0], out)))
    model.denoise(noisy(model, batch), LEVEL, layers, batch)
    assert tuple(index for index, _, _ in calls) == layers
    for (_, _, given), (_, taken, _) in pairwise(calls):
        assert taken is given


@both
def test_gradients_stay_in_the_layers_that_ran_and_in_what_is_shared(family):
    model, batch = make_model(family), make_batch()
    model.loss(DRAW, LEVEL, torch.ones(4), (1,), batch).backward()
    for name, parameter in model.named_parameters():
        if name.startswith(("layers.0.", "layers.2.")):
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and parameter.grad.any(), name


@both
def test_loss_and_estimate_have_the_shapes_of_the_protocol(family):
    model, batch = make_model(family), make_batch()
    z = noisy(model, batch)
    prediction = model.denoise(z, LEVEL, range(3), batch)
    losses = model.losses(DRAW, LEVEL, range(3), batch)
    assert losses.shape == (4,) and losses.dtype == torch.float32 and (losses > 0).all()
    assert model.estimate(prediction).shape == z.shape == model.target(batch).shape
    assert model.z_shape(batch) == z.shape and model.level_shape(batch) == LEVEL.shape


@both
def test_the_loss_is_the_sum_of_the_losses_each_times_its_scale(family):
    model, batch, scale = make_model(family), make_batch(), torch.tensor([0.5, 0.0, 3.0, 1.0])
    loss = model.loss(DRAW, LEVEL, scale, range(3), batch)
    losses = model.losses(DRAW, LEVEL, range(3), batch)
    assert loss.shape == () and loss.dtype == torch.float32
    torch.testing.assert_close(loss, (scale * losses).sum())


@both
def test_samples_do_not_see_each_other(family):
    model, batch = make_model(family), make_batch()
    z = noisy(model, batch).detach().requires_grad_()
    model.denoise(z, LEVEL, range(3), batch)[2].square().sum().backward()
    assert z.grad.flatten(1).any(1).tolist() == [False, False, True, False]
    together = model.losses(DRAW, LEVEL, range(3), batch)
    for i in range(4):
        alone = {name: tensor[i : i + 1] for name, tensor in batch.items()}
        draw = replace(DRAW, sample=i)
        losses = model.losses(draw, LEVEL[i : i + 1], range(3), alone)
        torch.testing.assert_close(losses, together[i : i + 1])


@both
def test_the_target_is_made_by_the_target_parts_alone(family):
    model, batch = make_model(family), make_batch()
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


@both
def test_a_step_runs_one_end_before_its_layers_and_one_after(family, monkeypatch):
    model, batch, running = make_model(family), make_batch(), []
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: running.append("layer"))

    def announced(name, end):
        def run(*args):
            running.append(name)
            result = end(*args)
            running.append(name)
            return result

        return run

    for name in model.stem_and_head:
        monkeypatch.setattr(type(model), name, announced(name, getattr(type(model), name)))
    model.loss(DRAW, LEVEL, torch.ones(4), (0, 1), batch)
    before, after = model.stem_and_head
    assert running == [before, before, "layer", "layer", after, after]


@both
def test_same_bits_every_run(family):
    model, batch = make_model(family), make_batch()
    z = noisy(model, batch)
    first, second = (model.denoise(z, LEVEL, range(3), batch) for _ in range(2))
    assert torch.equal(first, second)


class Recurrent(nn.Module):
    """Prelude, core and coda over tokens; the core is run as often as a block's layers say."""

    target_parts, stem_and_head, sigma_data = ("table",), (), 0.5

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
        (p, _), (of_z, of_F) = EDM(0.5).input(sigma), EDM(0.5).estimate(sigma)
        rotary = rotary_table(torch.arange(z.shape[1], device=z.device), 8)
        x = p * z + self.stem(batch["token"])
        for index in layers:
            x = self.layers[index](x, c, rotary)
        return self.head(of_z * z + of_F * self.norm(x))

    def level_shape(self, batch):
        return (len(batch["token"]),)

    def loss(self, draw, level, scale, layers, batch):
        z = add_noise(self.target(batch), torch.ones_like(level), level, draw)
        logits = self.denoise(z, level, layers, batch)
        losses = F.cross_entropy(logits.mT, batch["answer"], reduction="none").mean(1)
        return (scale * losses).sum()

    def estimate(self, prediction):
        return prediction.softmax(-1) @ self.rows()


class Tokens:
    """Words, each to be answered by the word after it in the alphabet."""

    token = torch.randint(5, (12, 6), generator=torch.Generator().manual_seed(4))

    def __len__(self):
        return len(self.token)

    def batch(self, indices, put):
        token = put(self.token[indices])
        return {"token": token, "answer": (token + 1) % 5}


def recurrent(num_blocks, sharing="joint"):
    return DiffusionBlocks(
        Recurrent(),
        num_blocks,
        process=PRIOR,
        weighting="none",
        layers=[0, 1, 1, 1, 2],
        sharing=sharing,
    )


def test_a_repeated_layer_runs_again_and_its_gradient_is_the_sum():
    model = randomise(Recurrent())
    unrolled = copy.deepcopy(model)
    unrolled.layers = nn.ModuleList(copy.deepcopy(model.layers[i]) for i in (0, 1, 1, 1, 2))
    batch, losses = Tokens().batch(torch.arange(4), torch.clone), []
    for network, layers in ((model, [0, 1, 1, 1, 2]), (unrolled, range(5))):
        losses.append(network.loss(DRAW, LEVEL, torch.full((4,), 0.25), layers, batch))
        losses[-1].backward()
    torch.testing.assert_close(*losses)
    parts = [dict(unrolled.layers[i].named_parameters()) for i in (1, 2, 3)]
    for name, parameter in model.layers[1].named_parameters():
        torch.testing.assert_close(parameter.grad, sum(part[name].grad for part in parts))


@pytest.mark.parametrize("num_blocks", [1, 2])
def test_a_recurrent_stack_is_trained_and_sampled_unchanged(num_blocks):
    blocks, data = recurrent(num_blocks), Tokens()
    trainer = Trainer(blocks, data, steps=60 // num_blocks, batch_size=8, lr=2e-2, ema=0.5)
    trainer.run()
    names = {"block0"} if num_blocks == 1 else {"block0", "block1", "shared"}
    assert set(trainer.counters()["groups"]) == names
    if num_blocks == 2:
        assert "model.layers.1.mlp.fc1.weight" in trainer.groups["shared"].parameters
    batch = data.batch(torch.arange(12), torch.clone)
    z = PRIOR.start(torch.randn(12, 6, 16), 80.0, 0.5)
    # heun's correction magnifies errors by the ratio of neighbouring levels
    halving = [80 / 2**i for i in range(11)]
    with torch.no_grad():
        for sampler, levels in ((euler, PRIOR.grid(4)), (heun, halving)):
            answer = sampler(blocks.eval().denoiser(batch), z, levels)
            word = (answer @ blocks.model.rows().T).argmax(-1)
            assert (word == batch["answer"]).float().mean() > 0.9


def test_a_core_that_two_blocks_run_cannot_be_copied():
    with pytest.raises(ValueError, match="a layer must be in one block, got layer 1 in several"):
        recurrent(2, sharing="copies")
