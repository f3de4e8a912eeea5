"""How far layers space the classes as the answers do: r and its null, seams, and sweeps."""

import json
from dataclasses import asdict, replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from cli.runs import SIZES, write_npz

from dbkernels import DiffusionBlocks, Draw, open_data
from dbkernels.cli.main import main
from dbkernels.models.dit import DiT
from dbkernels.models.vit import PRESETS, ViT

SMALL = replace(PRESETS["digits"], dim=16, depth=5, num_heads=2, mlp_hidden=32)
SAMPLES = 120


@pytest.fixture
def module(bench):
    return bench("isometry")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def data():
    return open_data("digits", "test")


def labelled(rng, classes=10, per_class=12, width=8):
    """Points about the centres of classes, and the classes of the points in no order."""
    labels = rng.permutation(np.repeat(np.arange(classes), per_class))
    centres = rng.normal(size=(classes, width))
    return centres[labels] + 0.1 * rng.normal(size=(len(labels), width)), labels


def rotation(rng, width):
    return np.linalg.qr(rng.normal(size=(width, width)))[0]


def by_hand(points, labels):
    centroids = [points[labels == label].mean(0) for label in np.unique(labels)]
    return [np.sqrt(((a - b) ** 2).sum()) for a, b in combinations(centroids, 2)]


def make_blocks(num_blocks=3, seed=0, **options):
    torch.manual_seed(seed)
    model = ViT(SMALL)
    for parameter in (model.head.weight, *(layer.modulation.weight for layer in model.layers)):
        torch.nn.init.normal_(parameter, std=0.5)
    return DiffusionBlocks(model, num_blocks, **options).eval()


def test_an_orthogonal_map_of_the_behaviours_has_r_of_one(module, rng):
    behaviours, labels = labelled(rng)
    found = module.isometry(3 * behaviours @ rotation(rng, 8) + 5, behaviours, labels)
    assert found.r == pytest.approx(1, abs=1e-12)
    assert found.p == pytest.approx(1 / 1001)
    assert -1 < found.low < found.median < found.high < 0.9


def test_nine_tenths_of_independent_activations_are_inside_the_null(module, rng):
    behaviours, labels = labelled(rng)
    found = [
        module.isometry(rng.normal(size=(10, 6))[labels], behaviours, labels) for _ in range(60)
    ]
    assert 49 <= sum(each.low < each.r < each.high for each in found) <= 58
    assert 0.4 < np.mean([each.p for each in found]) < 0.6
    assert all((each.p < 0.05) == (each.r > each.high) for each in found)


def test_r_is_the_correlation_of_the_distances_of_centroids(module, rng):
    behaviours, labels = labelled(rng)
    activations = behaviours**3 + rng.normal(size=behaviours.shape)
    expected = np.corrcoef(by_hand(activations, labels), by_hand(behaviours, labels))[0, 1]
    assert 0.2 < expected < 0.98
    assert module.isometry(activations, behaviours, labels).r == pytest.approx(expected)


@pytest.mark.parametrize("change", ["rotation", "scale", "shift", "order", "names"])
def test_r_does_not_see(change, module, rng):
    behaviours, labels = labelled(rng)
    activations = np.tanh(behaviours) + 0.5 * rng.normal(size=behaviours.shape)
    before = module.isometry(activations, behaviours, labels)
    order = rng.permutation(len(labels)) if change == "order" else slice(None)
    if change == "rotation":
        activations = activations @ rotation(rng, 8)
    if change == "scale":
        activations, behaviours = 100 * activations, 0.01 * behaviours
    if change == "shift":
        activations = activations + 30
    if change == "names":
        labels = rng.permutation(10)[labels] * 7
    after = module.isometry(activations[order], behaviours[order], labels[order])
    assert after.r == pytest.approx(before.r)


@pytest.mark.parametrize("side", ["activations", "behaviours"])
def test_only_the_largest_axes_are_compared(side, module, rng):
    behaviours, labels = labelled(rng, width=3)
    noise = rng.normal(size=(len(labels), module.MOST_AXES))
    centred = np.concatenate([behaviours, noise], axis=1)
    # centred and orthogonal columns: each is an axis, and the three of the classes have the least
    columns = np.linalg.qr(centred - centred.mean(0))[0]
    small, large = 0.9 * columns[:, :3], columns[:, 3:]

    def r(points):
        given = (points, behaviours) if side == "activations" else (behaviours, points)
        return module.isometry(*given, labels).r

    both = r(np.concatenate([small, large], axis=1))
    assert both == pytest.approx(r(large)) and r(small) > both + 0.2


def test_the_null_moves_whole_classes(module, rng):
    behaviours, labels = labelled(rng, classes=5)
    activations = behaviours + rng.normal(size=behaviours.shape)
    found = module.isometry(activations, behaviours, labels)
    first, second = by_hand(activations, labels), by_hand(behaviours, labels)
    of_pair = dict(zip(combinations(range(5), 2), first, strict=True))
    exact = []
    for places in permutations(range(5)):
        moved = [of_pair[tuple(sorted((places[j], places[k])))] for j, k in of_pair]
        exact.append(np.corrcoef(moved, second)[0, 1])
    ends = found.low, found.median, found.high
    assert ends == pytest.approx(np.percentile(exact, (5, 50, 95)), abs=0.05)
    assert found.p == pytest.approx(np.mean(np.array(exact) >= found.r - 1e-9), abs=0.02)
    # pairs that move on their own would almost never be as large as an r of 1
    same = module.isometry(behaviours, behaviours, labels)
    assert same.p == pytest.approx(1 / 120, abs=0.006)


def test_a_seed_is_of_the_null_alone(module, rng):
    behaviours, labels = labelled(rng)
    activations = behaviours + rng.normal(size=behaviours.shape)
    one, again, other = (
        module.isometry(activations, behaviours, labels, seed=s) for s in (1, 1, 2)
    )
    assert one == again and one.r == other.r and one.low != other.low


@pytest.mark.parametrize("side", ["activations", "behaviours"])
def test_a_side_that_knows_no_class_has_r_of_zero(side, module, rng):
    points, labels = labelled(rng)
    same = np.tile(rng.normal(size=8) * 50, (len(labels), 1))
    same += 1e-8 * rng.normal(size=same.shape)
    given = (same, points) if side == "activations" else (points, same)
    assert asdict(module.isometry(*given, labels)) == {
        "r": 0, "low": 0, "median": 0, "high": 0, "p": 1
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros(5, int)}, r"\(N, D\), \(N, C\) and \(N,\), got \(6, 2\), .* \(5,\)"),
        ({"activations": np.ones((7, 2))}, r"got \(7, 2\), \(6, 3\), \(6,\)"),
        ({"behaviours": np.ones(6)}, r"got \(6, 2\), \(6,\), \(6,\)"),
        ({"labels": np.array([0, 1, 0, 1, 1, 0])}, "labels must be of at least 3 classes, got 2"),
        ({"activations": np.full((6, 2), np.nan)}, "must be finite"),
        ({"behaviours": np.full((6, 3), np.inf)}, "must be finite"),
    ],
)
def test_isometry_rejects(change, message, module, rng):
    given = {"activations": rng.normal(size=(6, 2)), "behaviours": rng.normal(size=(6, 3))}
    given |= {"labels": np.array([0, 1, 2, 0, 1, 2])} | change
    with pytest.raises(ValueError, match=message):
        module.isometry(**given)


@pytest.mark.parametrize(
    ("r", "parts", "cuts"),
    [
        ((0, 0.4, 0.4, 0.4, 0.8, 0.8, 0.8), 2, (3,)),
        ((0, 0.4, 0.4, 0.4, 0.8, 0.8, 0.8), 1, ()),
        # a fall is a change like a rise, and cuts ascend whatever their changes
        ((0, 0.1, 0.3, 0.3, 0.3, 0.9, 0.2), 4, (1, 4, 5)),
        ((0, 0.9, 0.1, 0.9), 3, (1, 2)),
        ((0.9, 0.0, 0.1, 0.3), 2, (2,)),  # the stream before the layers is no layer
        ((0, 0.25, 0.5, 0.75, 1), 3, (1, 2)),  # of equal ones the earlier
        ((0, 0.5), 1, ()),
    ],
)
def test_seams_are_where_neighbours_differ_most(r, parts, cuts, module):
    assert module.seams(r, parts) == cuts
    split = module.split_at(cuts, len(r) - 1)
    assert len(split) == parts and sum(split) == len(r) - 1 and min(split) >= 1


def test_a_split_at_seams_is_one_of_blocks(module):
    split = module.split_at(module.seams((0, 0.1, 0.6, 0.7, 0.7, 0.1), 3), 5)
    assert split == (1, 3, 1)
    assert [block.layers for block in make_blocks(split=split)] == [(0,), (1, 2, 3), (4,)]


@pytest.mark.parametrize(("parts", "message"), [(0, "at least 1, got 0"), (4, "at most 3, got 4")])
def test_seams_reject(parts, message, module):
    with pytest.raises(ValueError, match=f"parts must be {message}"):
        module.seams((0, 0.1, 0.2, 0.3), parts)


@pytest.mark.parametrize("mode", ["trajectory", "within"])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_what_is_read_is_what_a_walk_computes(mode, num_blocks, module, data):
    blocks, indices = make_blocks(num_blocks), torch.arange(5)
    streams, logits, labels = module.read_out(blocks, data, indices, mode)
    batch, model = data.batch(indices), blocks.model
    levels, z, expected = module.walk(blocks, mode), torch.zeros(5, SMALL.dim), []
    with torch.no_grad():
        for block, level in zip(blocks, levels, strict=True):
            sigma = torch.full((5,), level)
            x, c = model.stem(z, sigma, batch["image"])
            expected += [x[:, 0]] if block.index == 0 else []
            for layer in block.layers:
                x = model.layers[layer](x, c)
                expected.append(x[:, 0])
            answer = model.tail(x[:, 0], c, z, sigma)
            if mode == "within":
                assert logits[block.index].numpy() == pytest.approx(answer.numpy(), abs=1e-4)
            if block.index < num_blocks - 1:
                D = model.estimate(answer)
                z = z + (levels[block.index + 1] - level) * (z - D) / level
    assert len(streams) == len(expected) == SMALL.depth + 1
    for stream, x in zip(streams, expected, strict=True):
        assert stream.numpy() == pytest.approx(x.numpy(), abs=1e-4)
    assert len(logits) == num_blocks and torch.equal(labels, batch["label"])
    assert logits[-1].numpy() == pytest.approx(answer.numpy(), abs=1e-4)


@pytest.mark.parametrize("num_blocks", [2, 3, 5])
def test_the_trajectory_ends_where_predictions_answer(num_blocks, module, data):
    blocks, indices = make_blocks(num_blocks), torch.arange(7)
    grid = blocks.process.grid(num_blocks, "cdf")
    assert module.walk(blocks, "trajectory") == pytest.approx(grid)
    answer = blocks.predictions(data.batch(indices), grid, Draw(0, step=0))[-1]
    _, logits, _ = module.read_out(blocks, data, indices, "trajectory")
    assert len(logits) == num_blocks
    for each in logits:
        assert each.numpy() == pytest.approx(answer.numpy(), abs=1e-4)


def test_every_block_has_one_level_under_any_scheme(module):
    for scheme in ("equal_probability", "log_uniform", "linear"):
        blocks = make_blocks(4, scheme=scheme)
        for mode in ("trajectory", "within"):
            levels = module.walk(blocks, mode)
            for block, level in zip(blocks, levels, strict=True):
                assert block.noise.low - 1e-6 <= level <= block.noise.high * (1 + 1e-6)
        # within a block: as much of the prior below as above, but for the ends of its interval
        for block, level in zip(blocks, levels, strict=True):
            low, high = blocks.process.mass(block.noise), replace(block.noise, high=level)
            assert blocks.process.mass(high) == pytest.approx(low / 2, rel=1e-3)
    one = make_blocks(1)
    assert module.walk(one, "trajectory") == pytest.approx([one.process.range.high])


def test_a_sweep_has_every_layer_in_running_order(module, data):
    blocks = make_blocks(2, layers=[0, 1, 1, 4], split=[3, 1])
    found = module.sweep(blocks, data, mode="within", samples=SAMPLES)
    assert found.layers == (0, 1, 2, 2, 5) and found.block == (0, 0, 0, 0, 1)
    deepest = make_blocks(2, split=[2, 3], noise_order="deepest")
    found = module.sweep(deepest, data, mode="within", samples=SAMPLES)
    assert found.layers == (0, 4, 5, 1, 2, 3) and found.block == (0, 0, 0, 1, 1, 1)


@pytest.mark.parametrize("sharing", ["joint", "copies"])
@pytest.mark.parametrize("mode", ["trajectory", "within"])
def test_a_sweep_compares_each_layer_with_its_behaviour(mode, sharing, module, data):
    blocks = make_blocks(sharing=sharing)
    found = module.sweep(blocks, data, mode=mode, seed=3, samples=SAMPLES)
    indices = torch.arange(SAMPLES) * len(data) // SAMPLES
    streams, logits, labels = module.read_out(blocks, data, indices, mode)
    for place, stream in enumerate(streams):
        step = logits[found.block[place]]
        behaviours = step.softmax(-1).sqrt().numpy()
        one = module.isometry(stream.numpy(), behaviours, labels.numpy(), seed=3)
        of_sweep = (found.r, found.null_low, found.null_median, found.null_high, found.p)
        assert [each[place] for each in of_sweep] == pytest.approx(
            [one.r, one.low, one.median, one.high, one.p]
        )
    # before the layers all images have one token; behind them r differs from layer to layer
    assert (found.r[0], found.p[0]) == (0, 1) and len(set(found.r)) == SMALL.depth + 1
    assert found.mode == mode and json.loads(json.dumps(asdict(found)))["r"] == list(found.r)


def test_the_modes_of_one_block_at_the_most_noise_are_almost_the_same(module, data):
    config = replace(SMALL, depth=2)
    process = make_blocks(1).process
    model = ViT(config)
    torch.nn.init.normal_(model.head.weight)
    blocks = DiffusionBlocks(model, 1, process=replace(process, sigma_min=79.0)).eval()
    first, second = (
        module.sweep(blocks, data, mode=mode, samples=SAMPLES) for mode in ("trajectory", "within")
    )
    assert first.r == pytest.approx(second.r, abs=1e-3)


class Noted:
    """Data that notes which samples were asked for."""

    def __init__(self, data):
        self.data, self.asked = data, []

    def __len__(self):
        return len(self.data)

    def batch(self, indices, put):
        self.asked += indices.tolist()
        return self.data.batch(indices, put)


def test_samples_are_evenly_spaced_and_at_most_all(module, data):
    few = Noted(data)
    module.sweep(make_blocks(), few, mode="within", samples=36)
    assert few.asked == [k * len(data) // 36 for k in range(36)]
    every = Noted(data)
    module.sweep(make_blocks(), every, mode="within", samples=10**6)
    assert every.asked == list(range(len(data)))


def test_a_sweep_leaves_no_hook(module, data):
    blocks = make_blocks()
    module.sweep(blocks, data, mode="within", samples=SAMPLES)
    with pytest.raises(RuntimeError, match="stop"), module.recorded(blocks):
        raise RuntimeError("stop")
    assert not any(layer._forward_hooks for layer in blocks.model.layers)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mode": "both"}, "mode must be one of trajectory, within, got both"),
        ({"samples": 0}, "samples must be at least 1, got 0"),
        ({"samples": 1}, "labels must be of at least 3 classes, got 1"),
    ],
)
def test_a_sweep_rejects(change, message, module, data):
    with pytest.raises(ValueError, match=message):
        module.sweep(make_blocks(), data, **{"mode": "within", **change})


def test_a_sweep_is_of_a_classifier(module, data):
    blocks = DiffusionBlocks(DiT(DiT.presets["digits"]), 3)
    with pytest.raises(ValueError, match="blocks must be of a ViT, got DiT"):
        module.sweep(blocks, data, mode="within")


def test_the_command_prints_every_layer_of_a_run(module, tmp_path, capsys):
    write_npz(tmp_path / "made.npz")
    run = ["train", "vit", "--data", str(tmp_path / "made.npz"), "--out", str(tmp_path / "run")]
    main([*run, *SIZES, "--lr", "0.1"])
    capsys.readouterr()
    module.OfRuns((tmp_path / "run",)).run()
    shown = capsys.readouterr().out
    assert "run: r of each layer" in shown and "trajectory" in shown and "within" in shown
    assert [f"│ {layer} " in shown for layer in range(5)] == [True] * 4 + [False]
