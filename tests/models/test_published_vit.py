"""The published ViT, said anew in plain torch: a ViT layer of Hugging Face between AdaLN's.

arXiv:2506.14202 and its code, which trains no layer of ours.
"""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from models.tiny import INTERVAL, randomise
from torch import nn

from dbkernels.models import ViT
from dbkernels.models.baseline import use_baseline
from dbkernels.ops import POLICIES, Draw, dropout, normals

SIGMA_DATA = 0.5
DRAW = Draw(seed=2, step=5)


class TheirLayer(nn.Module):
    def __init__(self, D, H, hidden, cond):
        super().__init__()
        self.heads = H
        self.layernorm_before = nn.LayerNorm(D, eps=1e-12)
        self.layernorm_after = nn.LayerNorm(D, eps=1e-12)
        self.query, self.key, self.value = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)
        self.dense = nn.Linear(D, D)
        self.intermediate, self.output = nn.Linear(D, hidden), nn.Linear(hidden, D)
        self.adaLN = nn.Linear(cond, 6 * D)

    def forward(self, hidden, conditioning):
        modulation = F.silu(self.adaLN(conditioning))
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=1)
        y = self.layernorm_before(hidden) * (1 + scale_a.unsqueeze(1)) + shift_a.unsqueeze(1)
        B, T, D = y.shape
        q, k, v = (
            projection(y).view(B, T, self.heads, -1).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / math.sqrt(D // self.heads)
        context = (scores.softmax(-1) @ v).transpose(1, 2).reshape(B, T, D)
        hidden = gate_a.unsqueeze(1) * self.dense(context) + hidden
        y = self.layernorm_after(hidden) * (1 + scale_m.unsqueeze(1)) + shift_m.unsqueeze(1)
        return gate_m.unsqueeze(1) * self.output(F.gelu(self.intermediate(y))) + hidden


class Theirs(nn.Module):
    def __init__(self, config):
        super().__init__()
        D, cond, tokens = config.dim, config.cond_dim, (config.image_size // config.patch) ** 2
        self.label_embeddings = nn.Embedding(config.num_classes, D)
        self.projection = nn.Conv2d(config.channels, D, config.patch, stride=config.patch)
        self.position_embeddings = nn.Parameter(torch.empty(1, tokens + 1, D))
        self.time_mlp = nn.Sequential(nn.Linear(256, cond), nn.SiLU(), nn.Linear(cond, cond))
        sizes = D, config.num_heads, config.mlp_hidden, cond
        self.layer = nn.ModuleList(TheirLayer(*sizes) for _ in range(config.depth))
        self.layernorm = nn.LayerNorm(D, eps=1e-12)
        self.adaLN = nn.Linear(cond, 2 * D)
        self.classifier = nn.Linear(D, config.num_classes)

    def forward(self, image, noisy, c_noise, indices):
        patches = self.projection(image).flatten(2).transpose(1, 2)
        hidden = torch.cat([noisy.unsqueeze(1), patches], 1) + self.position_embeddings
        frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
        angles = c_noise[:, None] * frequencies[None]
        embedded = torch.cat([angles.cos(), angles.sin()], dim=-1)
        conditioning = F.silu(self.time_mlp(embedded))
        for index in indices:
            hidden = self.layer[index](hidden, conditioning)
        return self.layernorm(hidden)[:, 0], conditioning

    def loss(self, batch, noise, sigma, indices):
        z = F.normalize(self.label_embeddings(batch["label"]), p=2, dim=-1)
        zt, s2 = z + sigma[:, None] * noise, sigma**2 + SIGMA_DATA**2
        hidden, c = self(batch["image"], zt / s2.sqrt()[:, None], sigma.log() / 4, indices)
        c_skip, c_out = SIGMA_DATA**2 / s2, sigma * SIGMA_DATA / s2.sqrt()
        out = hidden * c_out[:, None] + zt * c_skip[:, None]
        shift, scale = F.silu(self.adaLN(c)).chunk(2, dim=1)
        return F.cross_entropy(self.classifier(out * (1 + scale) + shift), batch["label"])


def theirs_of(model):
    """Their network with our weights: by name, parameters of theirs and how ours lie in them."""
    config = model.config
    patch = (config.patch, config.patch, config.channels)
    as_conv = model.patch.weight.unflatten(1, patch).permute(0, 3, 1, 2)
    state = {
        "label_embeddings.weight": model.label_table.weight,
        "projection.weight": as_conv,
        "projection.bias": model.patch.bias,
        "position_embeddings": model.positions[None],
        "time_mlp.0.weight": model.condition.fc1.weight,
        "time_mlp.0.bias": model.condition.fc1.bias,
        "time_mlp.2.weight": model.condition.fc2.weight,
        "time_mlp.2.bias": model.condition.fc2.bias,
        "adaLN.weight": model.modulation.linear.weight,
        "adaLN.bias": model.modulation.linear.bias,
    }
    names = {"norm1": "layernorm_before", "norm2": "layernorm_after", "attention.out": "dense"}
    names |= {"mlp.fc1": "intermediate", "mlp.fc2": "output", "modulation": "adaLN"}
    for kind in ("weight", "bias"):
        state[f"layernorm.{kind}"] = getattr(model.norm, kind)
        state[f"classifier.{kind}"] = getattr(model.head, kind)
        for i, layer in enumerate(model.layers):
            for ours, their in names.items():
                state[f"layer.{i}.{their}.{kind}"] = layer.get_parameter(f"{ours}.{kind}")
            thirds = getattr(layer.attention.qkv, kind).chunk(3)
            for their, third in zip(("query", "key", "value"), thirds, strict=True):
                state[f"layer.{i}.{their}.{kind}"] = third
    theirs = Theirs(config)
    theirs.load_state_dict(state)
    return theirs


def without_dropout(**sizes):
    return replace(ViT.preset("published"), dropout=0.0, attention_dropout=0.0, **sizes)


def batch_of(config, B=3):
    image = torch.randn(B, config.channels, config.image_size, config.image_size)
    return {"image": image, "label": torch.arange(B) * 7 % config.num_classes}


SMALL = {"dim": 24, "depth": 3, "num_heads": 3, "mlp_hidden": 40, "image_size": 8}


@pytest.mark.parametrize("method", ["fused", "stock"])
@pytest.mark.parametrize("sizes", [SMALL, {}], ids=["small", "as published"])
def test_loss_and_gradients_are_those_of_the_published_code(sizes, method):
    config = without_dropout(**sizes)
    model, batch = randomise(ViT(config), std=0.08), batch_of(config)
    if method != "fused":
        use_baseline(model, method)
    theirs = theirs_of(model)
    sigma, layers = torch.tensor([0.05, 0.9, 40.0]), range(config.depth)[-4:]
    noise = normals(DRAW, 3, config.dim)
    loss = model.loss(DRAW, sigma, torch.full((3,), 1 / 3), layers, batch, INTERVAL)
    their_loss = theirs.loss(batch, noise, sigma, layers)
    assert loss.item() == pytest.approx(their_loss.item(), rel=1e-6)
    loss.backward(), their_loss.backward()
    # ours where theirs are: what `theirs_of` does to weights it does to their gradients
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.data = parameter.grad
        else:
            parameter.data.zero_()
    ours = dict(theirs_of(model).named_parameters())
    for i in range(config.depth):
        # a softmax sees no bias of the keys, whose gradient is rounding beside that of the others
        query, key = (f"layer.{i}.{name}.bias" for name in ("query", "key"))
        grad = theirs.get_parameter(key).grad
        if grad is not None:
            assert (grad - ours[key]).abs().max() <= 1e-5 * theirs.get_parameter(query).grad.norm()
            theirs.get_parameter(key).grad = None
    for name, parameter in theirs.named_parameters():
        if parameter.grad is not None:
            error = (ours[name] - parameter.grad).norm() / parameter.grad.norm()
            assert error <= 1e-5, name


def test_a_new_one_has_the_published_distributions():
    model = ViT.from_preset("published")
    layer = model.layers[0]
    for weight in (layer.attention.qkv.weight, layer.mlp.fc1.weight, model.patch.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.positions.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.weight.any() and not layer.modulation.weight.any()
    assert (layer.norm1.eps, model.norm.eps) == (1e-12, 1e-12)


# dropout


def model_with(dropout=0.3, attention_dropout=0.2, **options):
    torch.manual_seed(0)
    config = replace(without_dropout(**SMALL), **options)
    config = replace(config, dropout=dropout, attention_dropout=attention_dropout)
    return randomise(ViT(config), std=0.3)


def loss_and_gradients(model, draw=DRAW, samples=slice(0, 3)):
    torch.manual_seed(1)
    batch = {name: t[samples] for name, t in batch_of(model.config).items()}
    level = torch.tensor([0.05, 0.9, 40.0])[samples]
    loss = model.loss(draw, level, torch.ones_like(level), range(3), batch, INTERVAL)
    return loss.detach(), torch.autograd.grad(loss, list(model.parameters()))


@pytest.mark.parametrize("recompute", POLICIES)
def test_each_policy_leaves_out_the_same(recompute):
    expected, actual = (loss_and_gradients(model_with(recompute=r)) for r in ("none", recompute))
    assert torch.equal(actual[0], expected[0])
    assert all(map(torch.equal, actual[1], expected[1]))


@pytest.mark.parametrize("method", ["stock", "checkpointed", "selective"])
def test_baselines_leave_out_the_same(method):
    model = model_with()
    loss, grads = loss_and_gradients(model)
    use_baseline(model, method)
    other, others = loss_and_gradients(model)
    torch.testing.assert_close(other, loss, rtol=1e-5, atol=0)
    for actual, expected in zip(others, grads, strict=True):
        assert (actual - expected).norm() <= 1e-3 * expected.norm()


def test_a_compiled_baseline_has_no_dropout():
    with pytest.raises(ValueError, match=r"dropout must be 0 for compiled, got 0\.3"):
        use_baseline(model_with(), "compiled")


def test_what_is_left_out_is_a_function_of_the_draw():
    model = model_with()
    (loss, grads), again = loss_and_gradients(model), loss_and_gradients(model)
    assert torch.equal(again[0], loss) and all(map(torch.equal, again[1], grads))
    other = loss_and_gradients(model, Draw(seed=2, step=6))[0]
    assert not torch.isclose(other, loss, rtol=1e-3)
    # a step in parts, and each layer for itself
    parts = [
        loss_and_gradients(model, Draw(2, 5, sample=first), slice(first, last))
        for first, last in ((0, 1), (1, 3))
    ]
    torch.testing.assert_close(sum(part[0] for part in parts), loss, rtol=1e-5, atol=1e-5)


def test_dropout_begins_with_what_the_first_layer_reads():
    model, seen = model_with(), []
    model.layers[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    loss_and_gradients(model), loss_and_gradients(model.eval())
    dropped, whole = seen
    assert torch.equal(dropped, dropout(whole, 0.3, DRAW))


@pytest.mark.parametrize("part", ["dropout", "attention_dropout"])
def test_only_the_loss_of_a_model_in_training_leaves_anything_out(part):
    both = {"dropout": 0.0, "attention_dropout": 0.0}
    model, plain = model_with(**{**both, part: 0.3}), model_with(**both)
    expected = loss_and_gradients(plain)[0]
    assert not torch.isclose(loss_and_gradients(model)[0], expected, rtol=1e-4)
    batch, level = batch_of(model.config), torch.tensor([0.05, 0.9, 40.0])
    for evaluated in ("losses", "denoise"):
        given = DRAW if evaluated == "losses" else torch.ones(3, 24)
        results = (getattr(m, evaluated)(given, level, range(3), batch) for m in (model, plain))
        assert torch.equal(*results)
    assert torch.equal(loss_and_gradients(model.eval())[0], expected)
