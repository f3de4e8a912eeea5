"""Blocks of somebody's own layers, which know nothing of this package."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from training.tiny import CPU, IN_BACKWARD, PREFETCH, assert_same, copies, equal, make_data, weights

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.prediction import EDM
from dbkernels.models import AdaLNLayer, LayerConfig, OwnLayers
from dbkernels.ops import add_noise
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

DIM = 16
DRAW = Draw(3, 5)
SCALE = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(DIM), nn.Linear(DIM, DIM)

    def forward(self, x):
        # tokens see each other, and so the answer sees the rest
        return x + self.fc(self.norm(x + x.mean(1, keepdim=True)))


class Told(Plain):
    def forward(self, x, c):
        return super().forward(x) * (1 + c[:, None])


def encoder(dropout=0.0, **settings):
    settings = {"batch_first": True, "norm_first": True, **settings}
    return nn.TransformerEncoderLayer(DIM, 2, 32, dropout, **settings)


def house():
    return AdaLNLayer(LayerConfig(DIM, num_heads=2, mlp_hidden=32, cond_dim=DIM))


class Net(nn.Module):
    def __init__(self, layer, out):
        super().__init__()
        self.patch, self.out = nn.Linear(4, DIM), nn.Linear(DIM, out)
        self.inner = nn.Module()
        self.inner.blocks = nn.Sequential(*(layer() for _ in range(3)))


def tokens_of(image):
    """(B, 1, 4, 4) -> (B, 4, 4), a row of the image each."""
    return image[:, 0]


def class_stem(net, z, batch):
    return torch.cat([z[:, None], net.patch(tokens_of(batch["image"]))], dim=1)


def image_stem(net, z, batch):
    return net.patch(tokens_of(z))


def label(net, batch):
    return batch["label"]


CLASSES = {
    "num_classes": 3,
    "target": label,
    "stem": class_stem,
    "head": lambda net, x, c, batch: net.out(x[:, 0]),
}
NUMBERS = {
    "target_shape": (1, 4, 4),
    "target": lambda net, batch: batch["image"],
    "stem": image_stem,
    "head": lambda net, x, c, batch: net.out(x)[:, None],
}
KINDS = {"classes": (CLASSES, 3), "numbers": (NUMBERS, 4)}
LAYERS = {
    "token": (Plain, "token"),
    "sum": (Plain, "sum"),
    "condition": (Told, "condition"),
    "encoder": (encoder, "token"),
    "dropout": (partial(encoder, 0.3), "sum"),
    "house": (house, "condition"),
}
kinds = pytest.mark.parametrize("kind", KINDS)
of_layers = pytest.mark.parametrize("of", LAYERS)


def make_model(kind="classes", of="token", **changes):
    """Always of the same weights."""
    torch.manual_seed(2)
    (given, out), (layer, level_as) = KINDS[kind], LAYERS[of]
    given = {"layers": "inner.blocks", "level_as": level_as, "dim": DIM, **given, **changes}
    return OwnLayers(Net(layer, out), **given)


def make_trainer(kind="classes", of="token", num_blocks=3, sharing="joint", **settings):
    blocks = DiffusionBlocks(make_model(kind, of), num_blocks, sharing=sharing)
    settings = {"steps": 4, "batch_size": 4, "lr": 1e-2, "ema": 0.9, **settings}
    return Trainer(blocks, make_data(), **settings)


@of_layers
@kinds
def test_blocks_train_each_their_own_layers(kind, of):
    trainer = make_trainer(kind, of)
    before = weights(trainer)
    rows = [trainer.step_block(trainer.blocks[1]) for _ in range(2)]
    after = weights(trainer)
    moved = {name for name in after if not torch.equal(after[name], before[name])}
    layers = {name.split("blocks.")[1][0] for name in moved if "blocks." in name}
    assert layers == {"1"} and {"model.net.patch.weight", "model.net.out.weight"} <= moved
    assert "model.embedding.fc2.weight" in moved
    assert ("model.table.weight" in moved) == (kind == "classes")
    assert [row["block_step"] for row in rows] == [0, 1]


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@of_layers
@kinds
def test_a_run_goes_on_to_the_bits_of_one_that_never_stopped(kind, of, sharing):
    whole, first, second = (make_trainer(kind, of, sharing=sharing) for _ in range(3))
    whole.run()
    for _ in range(5):
        first.step_block(first.next_block())
    torch.rand(7)  # what else draws does not matter
    second.restore(copies(first), first.counters())
    second.run()
    assert_same(second, whole)


@pytest.mark.parametrize("settings", [CPU, PREFETCH, IN_BACKWARD], ids=str)
@of_layers
def test_where_blocks_wait_changes_no_bit(of, settings):
    clip = {"clip": settings.get("clip", 1.0)}
    plain, other = make_trainer(of=of, **clip), make_trainer(of=of, **clip | settings)
    plain.run(), other.run()
    assert_same(other, plain)


@kinds
def test_micro_batches_and_workers_give_the_same_steps(kind):
    whole = make_trainer(kind)
    whole.run()
    workers = make_trainer(kind, workers=2)
    workers.run()
    assert_same(workers, whole)
    cut = make_trainer(kind, accumulate=2)
    cut.run()
    ours, theirs = weights(cut), weights(whole)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


@of_layers
def test_autocast_trains(of):
    trainer = make_trainer(of=of, autocast=True)
    assert trainer.step_block(trainer.blocks[0])["loss"] > 0


@kinds
def test_what_random_layers_draw_is_the_steps_and_no_one_elses(kind):
    trainer = make_trainer(kind, "dropout")
    model, block = trainer.blocks.model, trainer.blocks[0]
    batch = make_data().batch(torch.arange(4))
    before = torch.get_rng_state()

    def loss(draw):
        return trainer.blocks.loss(block, batch, draw).item()

    drawn = []
    hook = model.layers[0].register_forward_hook(lambda *_: drawn.append(torch.rand(()).item()))
    losses = [loss(DRAW), loss(Draw(3, 5))]
    assert losses[0] == losses[1] and drawn[0] == drawn[1]
    for draw in (Draw(4, 5), Draw(3, 6), Draw(3, 5, sample=4)):
        loss(draw)
    assert len(set(drawn)) == 4
    hook.remove()
    assert torch.equal(torch.get_rng_state(), before)
    level = torch.ones(4)
    z = model.noisy(level, batch, DRAW)
    with torch.no_grad():
        drop = [model.denoise(z, level, block.layers, batch) for _ in range(2)]
        model.eval()
        keep = [model.denoise(z, level, block.layers, batch) for _ in range(2)]
    assert not torch.equal(*drop) and torch.equal(*keep)


def test_blocks_of_classes_are_evaluated_and_know_their_labels():
    trainer = make_trainer(num_blocks=3, of="encoder", steps=60, batch_size=10)
    data, blocks = make_data(), trainer.blocks
    assert blocks.process == LogNormal(sigma_min=0.4) and blocks.weighting == "none"
    trainer.run()
    found = blocks.evaluate(data)
    assert found.metrics["accuracy"][-1] >= 0.9 and found.metrics["cross_entropy"][-1] < 0.5
    assert (
        0.5 < found.metrics["confidence"][-1] <= 1 and found.metrics["calibration_error"][-1] < 0.5
    )
    several = blocks.evaluate(data, start="noise", starts=3)
    assert several.metrics["accuracy"][-1] >= 0.9


def test_blocks_of_numbers_are_evaluated_and_draw_samples():
    trainer = make_trainer("numbers", steps=20)
    blocks = trainer.blocks
    assert blocks.process == LogNormal() and blocks.weighting == "process"
    before = blocks.evaluate(make_data())
    trainer.run()
    after = blocks.evaluate(make_data())
    assert sum(after.block_losses) < sum(before.block_losses) and after.metrics == {}
    images = blocks.sample({"image": torch.empty(5, 1, 4, 4)}, blocks.process.grid(4), DRAW)
    assert images.shape == (5, 1, 4, 4) and images.isfinite().all()


@of_layers
@kinds
def test_the_network_is_the_equations(kind, of):
    model = make_model(kind, of).eval()
    net, batch = model.net, make_data().batch(torch.arange(4))
    level = torch.tensor([0.5, 1.0, 2.0, 8.0])
    found = model.losses(DRAW, level, (2, 0), batch)
    if kind == "classes":
        z0 = F.normalize(model.table.weight, dim=-1)[batch["label"]]
    else:
        z0 = batch["image"]
    wide = level.view(-1, *[1] * (z0.dim() - 1))
    z = add_noise(z0, torch.ones(4), level, DRAW)
    r = (wide**2 + 0.25).sqrt()
    c = model.embedding(level.log() / 4)
    x = KINDS[kind][0]["stem"](net, z / r, batch)
    if LAYERS[of][1] == "token":
        x = torch.cat([x, c[:, None]], dim=1)
    if LAYERS[of][1] == "sum":
        x = x + c[:, None]
    for index in (2, 0):
        layer = net.inner.blocks[index]
        x = layer(x, c) if LAYERS[of][1] == "condition" else layer(x)
    if kind == "classes":
        logits = net.out(x[:, 0])
        expected = F.cross_entropy(logits, batch["label"], reduction="none")
        estimate = logits.softmax(-1) @ F.normalize(model.table.weight, dim=-1)
        prediction = logits
    else:
        x = x[:, :4]
        prediction = estimate = 0.25 / r**2 * z + wide * 0.5 / r * net.out(x)[:, None]
        expected = (estimate - z0).square().flatten(1).mean(1)
    assert torch.allclose(model.noisy(level, batch, DRAW), z)
    assert torch.allclose(model.denoise(z, level, (2, 0), batch), prediction, atol=1e-5)
    assert torch.allclose(model.estimate(prediction), estimate)
    # an error of F is smaller than that of the estimate by of_F
    scale = torch.ones(4) if kind == "classes" else (r / wide / 0.5).flatten() ** 0
    assert torch.allclose(found, expected * scale, rtol=1e-4)
    given = (DRAW, level, SCALE, (2, 0), batch, None)
    assert torch.allclose(model.loss(*given), (SCALE * expected).sum().float(), rtol=1e-4)
    own = z if kind == "numbers" else prediction
    for share, target in ((0.0, z0), (1.0, own)):
        taught = model.taught_loss(z, own, share, level, SCALE, (2, 0), batch)
        if kind == "numbers":
            wanted = (estimate - target).square().flatten(1).mean(1)
        else:
            told = F.one_hot(batch["label"], 3).float() if not share else logits.softmax(-1)
            wanted = F.cross_entropy(logits, told, reduction="none")
        assert torch.allclose(taught, (SCALE * wanted).sum().float(), rtol=1e-4)


def test_classes_of_many_places_count_as_their_mean():
    given = {
        "target": lambda net, batch: batch["image"][:, 0].gt(0).long(),
        "target_shape": (4, 4),
        "num_classes": 2,
        "stem": lambda net, z, batch: z.flatten(1, 2),
        "head": lambda net, x, c, batch: net.out(x).unflatten(1, (4, 4))[..., :2],
    }
    model = make_model(of="encoder", **given)
    batch = make_data().batch(torch.arange(4))
    assert model.z_shape(batch) == (4, 4, 4, DIM) == tuple(model.target(batch).shape)
    z, level = model.noisy(torch.ones(4), batch, DRAW), torch.ones(4)
    logits = model.denoise(z, level, (0, 1, 2), batch)
    label = given["target"](None, batch)
    expected = F.cross_entropy(logits.movedim(-1, 1), label, reduction="none").mean((1, 2))
    assert torch.allclose(model.losses(DRAW, level, (0, 1, 2), batch), expected)
    metrics = model.metrics(logits, batch)
    assert torch.allclose(metrics["cross_entropy"], expected)
    assert torch.allclose(metrics["accuracy"], (logits.argmax(-1) == label).float().mean((1, 2)))
    assert "confidence" not in metrics  # of one answer there are many


def test_one_number_of_a_sample_is_a_target():
    given = {
        "target": lambda net, batch: batch["image"].mean((1, 2, 3)),
        "target_shape": (),
        "stem": lambda net, z, batch: net.patch(tokens_of(batch["image"]) + z[:, None, None]),
        "head": lambda net, x, c, batch: net.out(x).mean((1, 2)),
    }
    blocks = DiffusionBlocks(make_model("numbers", **given), 3)
    trainer = Trainer(blocks, make_data(), steps=2, batch_size=4)
    assert trainer.step_block(blocks[0])["loss"] > 0


def test_the_condition_may_hold_more_than_the_level():
    given = {"condition": lambda net, c, batch: c + net.label(batch["label"])}
    model = make_model("numbers", "condition")
    model.net.label = nn.Embedding(3, DIM)
    more = make_model("numbers", "condition", **given)
    more.net = model.net
    batch, level = make_data().batch(torch.arange(4)), torch.ones(4)
    given = torch.ones(4, 1, 4, 4), level, (0, 1), batch
    plain, other = model.denoise(*given), more.denoise(*given)
    assert not torch.allclose(plain, other)
    nn.init.zeros_(model.net.label.weight)
    assert torch.equal(more.denoise(*given), plain)


def test_copies_have_stems_of_their_own():
    blocks = DiffusionBlocks(make_model(), 3, sharing="copies")
    nets = [blocks.of(block).net for block in blocks]
    assert len({id(net.patch) for net in nets}) == 3
    assert len({id(net.inner.blocks) for net in nets}) == 1
    assert not blocks.model.table.weight.requires_grad
    copied = copy.deepcopy(blocks)
    assert equal(dict(copied.named_parameters()), dict(blocks.named_parameters()))


def test_its_prediction_is_that_of_edm_at_its_own_scale():
    assert make_model(sigma_data=0.8).prediction == EDM(0.8)


class Keeps(Plain):
    def __init__(self):
        super().__init__()
        self.seen = nn.BatchNorm1d(DIM)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layers": "blocks"},
            "layers must name an nn.ModuleList .* of Net .*: none of that name",
        ),
        ({"layers": "patch"}, "nn.Sequential of Net that has layers, got 'patch': Linear of 0"),
        ({"layers": "inner"}, "that has layers, got 'inner': Module of 1"),
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"num_classes": -1}, "num_classes must be at least 0, got -1"),
        ({"level_as": "no"}, "level_as must be one of token, sum, condition, got no"),
        ({"stem": 3}, "stem must be a function, got int"),
        ({"condition": 3}, "condition must be a function, got int"),
        (
            {"level_as": "condition"},
            "layer 0 must take x and c .*, got Plain that takes 1 arg",
        ),
    ],
)
def test_rejects_settings_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        make_model(**changes)


@pytest.mark.parametrize(
    ("layer", "level_as", "message"),
    [
        (
            Told,
            "token",
            "must take x alone with level_as token, got Told that takes 2 args",
        ),
        (
            encoder,
            "condition",
            "must take x and c .*, got TransformerEncoderLayer that",
        ),
        (Keeps, "sum", "net must keep no statistics .*, got BatchNorm1d inner.blocks.0.seen"),
        (
            partial(encoder, batch_first=False),
            "sum",
            "0.self_attn must have batch_first=True",
        ),
    ],
)
def test_rejects_layers_that_are_not_for_blocks(layer, level_as, message):
    given = {"dim": DIM, "layers": "inner.blocks", "level_as": level_as, **CLASSES}
    with pytest.raises(ValueError, match=message.replace("args", "arguments")):
        OwnLayers(Net(layer, 3), **given)


def test_rejects_what_is_no_network():
    with pytest.raises(ValueError, match=r"net must be an nn\.Module, got function"):
        OwnLayers(label, dim=DIM, **CLASSES)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("classes", {"target": lambda n, b: b["label"][:2]}, r"target must .* \(4,\), got \(2,\)"),
        ("classes", {"target": lambda n, b: 3}, r"target must give a tensor \(4,\), got int"),
        (
            "classes",
            {"target": lambda n, b: b["label"].float()},
            "target must give torch.int64 where num_classes is 3, got torch.float32",
        ),
        (
            "numbers",
            {"target": lambda n, b: b["image"].double()},
            "target must give torch.float32 where num_classes is 0, got torch.float64",
        ),
        (
            "classes",
            {"target": lambda n, b: b["label"] + 1},
            r"target must give classes in \[0, 3\), got 3",
        ),
        ("classes", {"target": lambda n, b: b["label"] - 1}, r"in \[0, 3\), got -1"),
        (
            "numbers",
            {"target": lambda n, b: n.out.bias.sum() * b["image"]},
            "target must give what no parameter moves, got a tensor that requires a gradient",
        ),
        (
            "classes",
            {"stem": lambda n, z, b: z},
            r"stem must give a tensor \(4, 'T', 16\), got \(4, 16\)",
        ),
        (
            "classes",
            {"stem": lambda n, z, b: class_stem(n, z, b)[:1]},
            r"stem must give a tensor \(4, 5, 16\), got \(1, 5, 16\)",
        ),
        ("classes", {"stem": lambda n, z, b: None}, "stem must give a tensor .*, got NoneType"),
        (
            "classes",
            {"head": lambda n, x, c, b: n.out(x)},
            r"head must give a tensor \(4, 3\), got \(4, 5, 3\)",
        ),
        (
            "numbers",
            {"head": lambda n, x, c, b: n.out(x)},
            r"head must give a tensor \(4, 1, 4, 4\), got \(4, 4, 4\)",
        ),
        (
            "classes",
            {"condition": lambda n, c, b: c[:, :3]},
            r"condition must give a tensor \(4, 16\), got \(4, 3\)",
        ),
    ],
)
def test_a_function_that_gives_something_else_is_one_sentence(kind, changes, message):
    blocks = DiffusionBlocks(make_model(kind, **changes), 3)
    trainer = Trainer(blocks, make_data(), steps=2, batch_size=4)
    with pytest.raises(ValueError, match=message):
        trainer.step_block(blocks[0])


@pytest.mark.parametrize(
    ("gives", "got"), [(lambda x: (x,), "tuple"), (lambda x: x[:, 1:], r"\(4, 5, 16\)")]
)
def test_a_layer_that_changes_the_shape_is_one_sentence(gives, got):
    model = make_model()
    model.layers[1].register_forward_hook(lambda module, args, out: gives(out))
    blocks = DiffusionBlocks(model, 3)
    trainer = Trainer(blocks, make_data(), steps=2, batch_size=4)
    trainer.step_block(blocks[0])
    with pytest.raises(ValueError, match=rf"layer 1 must give a tensor \(4, 6, 16\), got {got}"):
        trainer.step_block(blocks[1])
