"""The equations of the baselines, each against a few lines of plain torch."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from baseline_case import DRAW, VIT, batch_of, loss_of, shaken, without_dropout
from torch import nn

from dbkernels.models.vit import ViT
from dbkernels.ops.philox import Draw, normals, uniforms

# layers, Forward-Forward, contrastive, greedy


@pytest.mark.parametrize("silu", [False, True])
def test_a_layer_without_noise_is_an_ordinary_one(bench, silu):
    """Of which each token attends to all tokens alike, where no query differs."""
    sizes = replace(VIT, silu_modulation=silu)
    layer = bench("baselines.vit_parts").Plain(ViT(sizes).layers[0])
    attention, mlp = layer.layer.attention, layer.layer.mlp
    x, D = torch.randn(3, 5, 16), 16
    attention.qkv.weight.data[: 2 * D] = 0

    def norm(x):
        return F.layer_norm(x, (D,), eps=sizes.eps)

    value = F.linear(norm(x), attention.qkv.weight[2 * D :], attention.qkv.bias[2 * D :])
    y = x + attention.out(value.mean(1, keepdim=True))
    y = y + mlp.fc2(F.gelu(mlp.fc1(norm(y)), approximate="tanh"))
    torch.testing.assert_close(layer(x), y)


def test_goodness_is_the_mean_square_of_the_mean_patch(bench):
    ff, x = bench("baselines.forward_forward"), torch.randn(3, 5, 4)
    expected = [sum(sum(x[b, t, d] for t in range(1, 5)) ** 2 for d in range(4)) for b in range(3)]
    torch.testing.assert_close(ff.goodness(x), torch.stack(expected) / 4 / 16)
    torch.testing.assert_close(ff.normalised(x), x / x.square().sum((1, 2), keepdim=True).sqrt())


@pytest.mark.parametrize("symba", [False, True])
def test_forward_forward_compares_the_goodness_of_labels(bench, make_baseline, symba):
    ff, row, batch = (
        bench("baselines.forward_forward"),
        shaken(make_baseline("vit", "forward-forward")),
        batch_of(),
    )
    row.symba = symba
    parts, image, label = row.model.layers, batch["image"], batch["label"]

    def goodness(label):
        x = parts[0]["layer"](parts[0]["stem"](image, label))
        x = x / x.flatten(1).norm(dim=1)[:, None, None]
        return parts[1]["layer"](x)[:, 1:].mean(1).square().mean(1)

    g, other = goodness(label), goodness(ff.other_labels(label, 3, DRAW))
    expected = ((1 + (2 - g).exp()).log() + (1 + (other - 2).exp()).log()).mean() / 2
    if symba:
        expected = (1 + (other - g).exp()).log().mean()
    torch.testing.assert_close(loss_of(row, 1), expected)
    tried = [goodness(torch.full((6,), k)) for k in range(3)]
    expected = torch.stack(tried, dim=1).softmax(1).detach()
    torch.testing.assert_close(row.answer(batch, DRAW), expected)


@pytest.mark.parametrize("num_classes", [2, 4])
def test_other_labels_are_uniform_over_the_others(bench, num_classes):
    label = torch.arange(4000) % num_classes
    other = bench("baselines.forward_forward").other_labels(label, num_classes, DRAW)
    counts = torch.zeros(num_classes, num_classes).index_put_(
        (label, other), torch.ones(4000), accumulate=True
    )
    expected = 4000 / num_classes / (num_classes - 1)
    assert counts.diagonal().eq(0).all()
    assert (counts[~torch.eye(num_classes).bool()] - expected).abs().max() < 5 * expected**0.5


def test_contrast_is_the_mean_over_pairs_of_a_class(bench):
    module, label = bench("baselines.contrastive"), [0, 1, 0, 0, 1, 2, 2]
    features = F.normalize(torch.randn(7, 3, generator=torch.Generator().manual_seed(0)))
    features[2] = features[0]  # whose cosine and margin together are above 1
    s = [
        [
            min(float(a @ b) + 0.3, 1) if k == j else float(a @ b)
            for b, j in zip(features, label, strict=True)
        ]
        for a, k in zip(features, label, strict=True)
    ]
    total = 0
    for i in range(7):
        others = sum(math.exp(s[i][k] / 0.15) for k in range(7) if k != i)
        pairs = [j for j in range(7) if j != i and label[j] == label[i]]
        total += sum(math.log(others) - s[i][j] / 0.15 for j in pairs) / len(pairs) / 7
    found = module.supervised_contrast(5 * features, torch.tensor(label), 0.3)
    assert float(found) == pytest.approx(total, rel=1e-5)


def test_contrastive_views_differ_and_margins_fall(make_baseline):
    sizes, seen = VIT.resized({"depth": 4}), []

    def augment(batch, draw):
        seen.append(draw)
        return {**batch, "image": batch["image"] + len(seen)}

    row = make_baseline("vit", "contrastive forward-forward", sizes=sizes, augment=augment)
    row.features = lambda index, image: images.append(image) or image.flatten(1)
    images = []
    loss_of(row, 2)
    image = batch_of()["image"]
    torch.testing.assert_close(images[0], torch.cat([image + 1, image + 2]))
    assert seen[0] != seen[1] and {each.step for each in seen} == {DRAW.step}
    assert row.margins == pytest.approx([0.4, 0.3, 0.2, 0.1])


def test_greedy_reads_the_last_head(make_baseline):
    row, batch = shaken(make_baseline("vit", "greedy")), batch_of()
    parts = row.model.layers
    x = parts[0]["layer"](parts[0]["stem"](batch["image"]))
    last = parts[1]["head"](parts[1]["layer"](x)[:, 0])
    for index, logits in enumerate((parts[0]["head"](x[:, 0]), last)):
        expected = F.cross_entropy(logits, batch["label"])
        torch.testing.assert_close(loss_of(row, index), expected)
    torch.testing.assert_close(row.answer(batch, DRAW), last.softmax(1).detach())


# NoProp


@pytest.mark.parametrize("timed", [False, True])
def test_the_cnn_is_three_branches(bench, timed):
    module, config = bench("baselines.cnn"), bench("baselines").CNNConfig((4, 8, 6), hidden=16)
    cond_dim = 5 if timed else 0
    net = module.CNN(config, (2, 16, 16), 3, 7, cond_dim=cond_dim, normed=not timed).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    image, z, c = torch.randn(4, 2, 16, 16), torch.randn(4, 3), torch.randn(4, 5)

    def full(layers, x):
        x = F.linear(x, layers[0].weight, layers[0].bias)
        if not timed:
            x = F.layer_norm(x, x.shape[1:], layers[1].weight, layers[1].bias)
        return x.relu()

    i, step = image, 4 if timed else 5
    for place, groups in enumerate((4, 8, 6)):
        each = net.image[place * step : (place + 1) * step]
        i = F.conv2d(i, each[0].weight, each[0].bias, padding=1)
        if not timed:
            i = F.group_norm(i, groups, each[1].weight, each[1].bias)
        i = F.max_pool2d(i.relu(), 2)
    h = full(net.first, z)
    parts = [full(net.image[-1], i.flatten(1)), net.second(h).relu() + h]
    x = torch.cat([*parts, full(net.time, c)] if timed else parts, dim=1)
    x = full(net.out[1], full(net.out[0], x))
    torch.testing.assert_close(net(z, image, c if timed else None), net.out[2](x))


def test_nets_of_discrete_steps_have_norms_and_those_of_all_times_none(make_baseline):
    norms = nn.GroupNorm, nn.LayerNorm
    for name, normed in (("noprop-dt", True), ("noprop-ct", False), ("noprop-fm", False)):
        found = [m for m in make_baseline("cnn", name).blocks.modules() if isinstance(m, norms)]
        assert bool(found) == normed


@pytest.mark.parametrize("network", ["vit", "cnn"])
@pytest.mark.parametrize("name", ["noprop-ct", "noprop-fm"])
def test_a_net_of_all_times_hears_z_the_image_and_the_time(make_baseline, network, name):
    row = without_dropout(shaken(make_baseline(network, name)))
    z, image, time = torch.randn(6, 4), batch_of()["image"], torch.full((6,), 0.3)
    found = row.output(z, image, time)
    for other in ((z + 1, image, time), (z, image.flip(-1), time), (z, image, time + 0.5)):
        assert (row.output(*other) - found).abs().amax(1).min() > 1e-3


@pytest.mark.parametrize("count", [2, 10])
def test_posteriors_keep_the_marginals(bench, count):
    """Mean, variance and covariance of neighbours fix all three coefficients."""
    dt = bench("baselines.noprop_dt")
    A = dt.cosine_signal(count)
    assert A[0] == 0 and sorted(A) == A and 0.999 < A[-1] < 1 and len(A) == count + 1
    middle = math.cos(math.pi / 2 * (0.5 + 0.008) / 1.008) ** 2
    assert A[count // 2] == pytest.approx(middle)
    for t, (a, b, c) in enumerate(dt.posteriors(A), 1):
        assert a + b * math.sqrt(A[t - 1]) == pytest.approx(math.sqrt(A[t]))
        assert b**2 * (1 - A[t - 1]) + c == pytest.approx(1 - A[t])
        ratio = A[t - 1] / A[t]
        assert b * (1 - A[t - 1]) == pytest.approx(math.sqrt(ratio) * (1 - A[t]))


def test_steps_of_a_perfect_net_have_the_marginal(bench):
    """And so has a chain that adds noise step by step."""
    dt, N = bench("baselines.noprop_dt"), 40_000
    A, u = dt.cosine_signal(10), torch.tensor([[1.0, -0.5]])
    random = torch.Generator().manual_seed(0)
    noise = partial(torch.randn, N, 2, generator=random)
    z = noise()
    for t, (a, b, c) in enumerate(dt.posteriors(A), 1):
        z = a * u + b * z + math.sqrt(c) * noise()
        marginal = dt.noisy(u.expand(N, 2), A[t], Draw(0, t))
        for found in (z, marginal):
            torch.testing.assert_close(found.mean(0), math.sqrt(A[t]) * u[0], atol=0.025, rtol=0)
            variance = torch.full((2,), 1 - A[t])
            torch.testing.assert_close(found.var(0), variance, atol=1e-5, rtol=0.03)
    for t in range(9, 4, -1):
        ratio = A[t] / A[t + 1]
        z = math.sqrt(ratio) * z + math.sqrt(1 - ratio) * noise()
    torch.testing.assert_close(z.mean(0), math.sqrt(A[5]) * u[0], atol=0.025, rtol=0)
    torch.testing.assert_close(z.var(0), torch.full((2,), 1 - A[5]), atol=0, rtol=0.03)


@pytest.mark.parametrize("signal", [0.0, 0.3, 0.9])
def test_kl_is_that_of_normals(bench, signal):
    u = torch.randn(3, 4)
    of_z = torch.distributions.Normal(math.sqrt(signal) * u, math.sqrt(1 - signal))
    expected = torch.distributions.kl_divergence(of_z, torch.distributions.Normal(0.0, 1.0))
    torch.testing.assert_close(bench("baselines.noprop_dt").kl(u, signal), expected.sum(1))


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_discrete_steps_are_weighted_by_their_gain_of_signal(bench, make_baseline, network):
    purpose = bench("baselines.baseline").purpose
    row, batch = without_dropout(make_baseline(network, "noprop-dt")), batch_of()
    A, label, E = row.signal, batch["label"], row.model.table.weight
    T, u = len(A) - 1, E[label]
    assert T == (2 if network == "vit" else 4) == len(row.blocks)
    for t in range(1, T + 1):
        noises = [normals(purpose(DRAW, k), 6, 4) for k in range(2)]
        z_T = math.sqrt(A[T]) * u + math.sqrt(1 - A[T]) * noises[0]
        z = math.sqrt(A[t - 1]) * u + math.sqrt(1 - A[t - 1]) * noises[1]
        u_hat = row.model.layers[t - 1](z, batch["image"], None).softmax(1) @ E
        gain = A[t] / (1 - A[t]) - A[t - 1] / (1 - A[t - 1])
        errors = ((u_hat - u) ** 2).sum(1).mean()
        expected = F.cross_entropy(row.model.read_out(z_T), label) + T / 2 * 0.1 * gain * errors
        torch.testing.assert_close(loss_of(row, t - 1), expected)


def test_the_learned_schedule_rises_and_knows_its_slope(bench):
    schedule = bench("baselines.noprop_ct").Schedule().double()
    for parameter in schedule.parameters():
        nn.init.normal_(parameter)
    time = torch.linspace(0, 1, 50, dtype=torch.float64, requires_grad=True)
    snr = (-schedule.g(time)).exp()
    (slope,) = torch.autograd.grad(snr.sum(), time)
    torch.testing.assert_close(schedule.snr_slope(time), slope)
    assert (slope > 0).all()
    signal, noise = schedule(time)
    torch.testing.assert_close(signal / noise, snr)
    torch.testing.assert_close(signal + noise, torch.ones_like(signal))
    fresh = bench("baselines.noprop_ct").Schedule()
    ends = fresh.g(torch.tensor([0.0, 1.0])).tolist()
    assert ends == pytest.approx([5, -5], rel=1e-5)


@pytest.mark.parametrize("network", ["vit", "cnn"])
def test_continuous_times_are_weighted_by_the_slope_of_signal(bench, make_baseline, network):
    ct, purpose = bench("baselines.noprop_ct"), bench("baselines.baseline").purpose
    row, batch = without_dropout(make_baseline(network, "noprop-ct")), batch_of()
    model, label = row.model, batch["label"]
    u = model.table.weight[label]
    time = uniforms(purpose(DRAW, ct.TIME), 6).float()
    A = 1 / (1 + model.schedule.g(time).exp())[:, None]
    first, last = (1 / (1 + model.schedule.g(torch.tensor(end)).exp()) for end in (0.0, 1.0))
    z = A.sqrt() * u + (1 - A).sqrt() * normals(purpose(DRAW, ct.LEVEL), 6, 4)
    z_1 = last.sqrt() * u + (1 - last).sqrt() * normals(purpose(DRAW, ct.LAST_NOISE), 6, 4)
    logits = model.layers[0](z, batch["image"], model.time(1000 * time))
    errors = ((logits.softmax(1) @ model.table.weight - u) ** 2).sum(1)
    kl = (first * u**2 - first - (1 - first).log()).sum(1) / 2
    weighted = model.schedule.snr_slope(time) / 2 * errors
    expected = F.cross_entropy(model.read_out(z_1), label) + (kl + weighted).mean()
    torch.testing.assert_close(loss_of(row), expected)


def test_flow_matching_regresses_the_velocity(bench, make_baseline):
    ct, purpose = bench("baselines.noprop_ct"), bench("baselines.baseline").purpose
    row, batch = without_dropout(make_baseline("cnn", "noprop-fm")), batch_of()
    model, label = row.model, batch["label"]
    u, t = model.table.weight[label], uniforms(purpose(DRAW, ct.TIME), 6).float()
    z_0 = normals(purpose(DRAW, ct.LEVEL), 6, 4)
    z = t[:, None] * u + (1 - t)[:, None] * z_0
    v = model.layers[0](z, batch["image"], model.time(1000 * t))
    reached = F.cross_entropy(model.read_out(z + (1 - t)[:, None] * v), label)
    expected = ((v - u + z_0) ** 2).sum(1).mean() + reached
    torch.testing.assert_close(loss_of(row), expected)


@pytest.mark.parametrize("name", ["noprop-dt", "noprop-ct", "noprop-fm"])
def test_the_answer_of_perfect_nets_ends_at_the_class(make_baseline, name):
    row, batch, ends = make_baseline("vit", name, embedding=3), batch_of(), []
    u = row.model.table.weight[batch["label"]].detach()
    row.read_out = lambda z: ends.append(z) or z
    if name == "noprop-fm":
        row.output = lambda z, image, time: (u - z) / (1 - time[:, None])
    else:
        row.estimate = lambda logits: u
    row.answer(batch, DRAW)
    if name == "noprop-fm":
        torch.testing.assert_close(ends[0], u)
    elif name == "noprop-ct":
        times = torch.tensor([0.0, 1.0])
        signal, noise = (each.sqrt() for each in row.model.schedule(times))
        # the noise of the start is what is left of it
        kept = (normals(DRAW, 6, 3) - signal[0] * u) / noise[0]
        torch.testing.assert_close(ends[0], signal[1] * u + noise[1] * kept)
    else:
        A = row.signal[-1]
        off = (ends[0] - math.sqrt(A) * u) / math.sqrt(1 - A)
        assert 0.5 < off.std() < 1.5 and off.mean().abs() < 1


@pytest.mark.parametrize("network", ["vit", "cnn"])
@pytest.mark.parametrize("name", ["noprop-dt", "noprop-ct", "noprop-fm"])
def test_one_hot_embeddings_stay(make_baseline, network, name):
    row = make_baseline(network, name, embedding=0)
    loss_of(row).backward()
    assert torch.equal(row.model.table.weight, torch.eye(3))
    assert row.model.table.weight.grad is None
    learned = make_baseline(network, name).model.table.weight
    torch.testing.assert_close(learned @ learned.T, torch.eye(3))


def test_diffusion_blocks_nets_get_the_noisy_label_the_image_and_the_level(make_baseline):
    row, batch = without_dropout(make_baseline("cnn", "diffusion blocks")), batch_of()
    model, z, level = row.model, torch.randn(6, 4), torch.linspace(0.1, 3, 6)
    c = model.embedding(level.log() / 4)
    scaled = z / (level**2 + 0.25).sqrt()[:, None]
    for block in row.blocks:
        net = model.layers[block.index].net
        expected = net(scaled, batch["image"], c)
        assert block.layers == (block.index,)
        torch.testing.assert_close(model.denoise(z, level, block.layers, batch), expected)
    low, high = row.blocks[1].noise.low, row.blocks[1].noise.high
    assert row.blocks[1].trained_noise.high == pytest.approx(high * (high / low) ** 0.1)
    assert len(row.levels) == 12 and row.levels[0] == 80 and row.levels[-1] == 0.002
