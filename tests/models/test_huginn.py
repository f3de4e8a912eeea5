"""What the recurrent family alone has: what a state reads, and its recurrences without noise."""

import math
from dataclasses import replace
from functools import partial
from itertools import product
from statistics import NormalDist

import pytest
import torch
from models.tiny import DRAW, INTERVAL, LEVEL, SCALE, randomise
from scipy.stats import poisson

from dbkernels.models import Huginn, HuginnConfig, huginn
from dbkernels.models.read_out import per_token
from dbkernels.ops import Draw, normals

CONFIG = HuginnConfig(
    dim=8, depth=5, num_heads=2, mlp_hidden=6, cond_dim=5, length=6, vocabulary=7,
    prelude=1, coda=2, read_out="paper", recurrences=4, truncation=2, sigma_data=0.7,
)  # fmt: skip
TOKEN = torch.tensor([[3, 0, 5, 2, 6, 1], [1, 1, 4, 0, 2, 3], [6, 5, 4, 3, 2, 1]])
BATCH = {"token": TOKEN}
CHANGED = 2  # place of the token that is another
EVERY = range(CONFIG.depth)
PRELUDE, CORE, CODA = (0,), (1, 2), (3, 4)


def make(**settings):
    torch.manual_seed(3)
    return randomise(Huginn(replace(CONFIG, **settings)))


def moved(before, after):
    """Places of tokens whose numbers are others."""
    return (before != after).any(-1).any(0).nonzero().flatten().tolist()


def with_another_token():
    other = TOKEN.clone()
    other[:, CHANGED] = (other[:, CHANGED] + 1) % CONFIG.vocabulary
    return {"token": other}


@pytest.mark.parametrize("layers", [EVERY, CORE, PRELUDE])
def test_a_state_reads_the_tokens_before_it_and_noisy_ones_up_to_its_own(layers):
    model = make()
    denoise, z = partial(model.denoise, level=LEVEL, layers=layers), model.noisy(LEVEL, BATCH, DRAW)
    before, after = denoise(z, batch=BATCH), denoise(z, batch=with_another_token())
    assert moved(before, after) == [3, 4, 5]
    z = z.clone()
    z[:, CHANGED] += 1
    # without a layer that reads the state, each reads its own noise alone
    assert moved(before, denoise(z, batch=BATCH)) == ([2] if layers == PRELUDE else [2, 3, 4, 5])


def test_without_noise_the_next_token_is_named_from_those_before_it():
    model, losses = make(), []
    for batch in (BATCH, with_another_token()):
        rows = model.recurred(DRAW, EVERY, batch["token"], 3)
        losses.append(model.cross_entropy(rows, TOKEN, None, "none"))
    assert moved(losses[0][..., None], losses[1][..., None]) == [3, 4, 5]


def test_the_equations():
    model, z = make(), make().noisy(LEVEL, BATCH, DRAW)
    constant, scale = model.constant_condition(3), per_token(model.prediction.scale(LEVEL))
    c = model.condition(LEVEL.log() / 4) + constant
    e = model.run(PRELUDE, model.tokens_before(TOKEN), constant)
    A = torch.cat([model.from_state.weight, model.from_tokens.weight], dim=1)

    def core(state, c):
        return model.run(CORE, torch.cat([state, e], dim=-1) @ A.T, c)

    h = model.run(CODA, core(scale * z, c), c)
    expected = model.head.logits(model.head.noisy(h, c, z, LEVEL), None)
    torch.testing.assert_close(model.denoise(z, LEVEL, EVERY, BATCH), expected)

    state = normals(DRAW, 3, 6 * 8).view(3, 6, 8)
    for _ in range(4):
        state = core(state / state.square().mean(-1, keepdim=True).sqrt(), constant)
    rows = model.head.clean(model.run(CODA, state, constant), constant)
    losses = torch.nn.functional.cross_entropy(
        model.head.logits(rows, None).mT, TOKEN, reduction="none"
    )
    actual = model.conventional_losses(DRAW, EVERY, BATCH)
    torch.testing.assert_close(actual, losses.mean(1), rtol=1e-4, atol=1e-5)


def test_a_model_may_be_all_core():
    model = make(prelude=0, coda=0)
    z, constant = model.noisy(LEVEL, BATCH, DRAW), model.constant_condition(3)
    x, c = model.stem(z, LEVEL, model.tokens_before(TOKEN))
    rows = model.head.noisy(model.run(EVERY, x, c), c, z, LEVEL)
    expected = model.head.logits(rows, None)
    torch.testing.assert_close(model.denoise(z, LEVEL, EVERY, BATCH), expected)
    rows = model.recurred(DRAW, EVERY, TOKEN, 0)
    state = normals(DRAW, 3, 6 * 8).view(3, 6, 8)
    torch.testing.assert_close(rows, model.head.clean(state, constant))


def test_the_stream_stays_wide_under_autocast():
    model, dtypes = make(), []
    for layer in model.layers:
        layer.register_forward_pre_hook(lambda _, args: dtypes.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.recurred(DRAW, EVERY, TOKEN, 2)
        model.denoise(model.noisy(LEVEL, BATCH, DRAW), LEVEL, EVERY, BATCH)
    assert set(dtypes) == {torch.float32} and len(dtypes) > 5


def gradients(model, recurrences, *, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = model.cross_entropy(
            model.recurred(DRAW, EVERY, TOKEN, recurrences), TOKEN, None, "mean"
        )
    named = {
        name: p for name, p in model.named_parameters() if not name.startswith(("cond", "targ"))
    }
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


@pytest.mark.parametrize("recurrences", [1, 2, 3, 5])
def test_the_gradient_passes_through_the_last_recurrences_and_no_others(recurrences):
    """As if these began where the others end, and the graph were kept of them all."""
    model, starts = make(), []
    actual = gradients(model, recurrences)
    model.norm.register_forward_pre_hook(lambda _, args: starts.append(args[0]))
    whole = make(truncation=recurrences)
    expected = gradients(whole, recurrences)
    same = all(torch.equal(actual[name], expected[name]) for name in expected)
    assert same == (recurrences <= CONFIG.truncation)
    gradients(model, recurrences)
    with torch.no_grad():
        assert not model.recurred(DRAW, EVERY, TOKEN, recurrences).requires_grad
    assert not any(state.requires_grad for state in starts[recurrences:])
    del starts[recurrences:]
    assert [s.requires_grad for s in starts] == [
        i > max(recurrences - 2, 0) for i in range(recurrences)
    ]


def test_the_weights_of_the_recurrence_learn_under_autocast_too():
    """A rounded copy of a weight that was made without a gradient must not serve with one."""
    for name, gradient in gradients(make(), 4, autocast=True).items():
        assert gradient.any() and gradient.isfinite().all(), name


def test_numbers_of_recurrences_have_huginns_law():
    model = make(recurrences=32)
    drawn = torch.tensor([model.recurrences(Draw(5, step)) for step in range(4000)]).double()
    # of a rate with mean m and variance m**2 (exp(0.25) - 1)
    deviation = math.sqrt(32 + 32**2 * math.expm1(0.25))
    assert drawn.mean().item() == pytest.approx(33, abs=4 * deviation / math.sqrt(4000))
    assert drawn.std().item() == pytest.approx(deviation, rel=0.1)
    assert drawn.median().item() == pytest.approx(1 + 32 * math.exp(-0.125), abs=1)
    assert drawn.min() >= 1
    few = [make(recurrences=1).recurrences(Draw(5, step)) for step in range(200)]
    assert min(few) == 1 and 1.6 < sum(few) / 200 < 2.4


@pytest.mark.parametrize("recurrences", [1, 32])
@pytest.mark.parametrize("words", list(product((0, 2**20, 2**31, 2**32 - 1), repeat=2)))
def test_a_number_of_recurrences_is_the_quantile_that_its_words_name(
    monkeypatch, words, recurrences
):
    """Of the rarest ones too."""
    monkeypatch.setattr(huginn, "philox", lambda *counter: (*words, 5, 5))
    found = make(recurrences=recurrences).recurrences(DRAW)
    of_rate, of_number = ((word + 0.5) / 2**32 for word in words)
    rate = recurrences * math.exp(0.5 * NormalDist().inv_cdf(of_rate) - 0.125)
    assert found == 1 + poisson.ppf(of_number, rate)


def test_a_step_has_the_number_of_recurrences_that_it_always_had():
    """A run that goes on has to draw what it would have drawn before."""
    model = make(recurrences=32)
    numbers = [model.recurrences(Draw(5, step)) for step in (0, 1, 2, 3, 2**40)]
    assert numbers == [32, 17, 58, 28, 34]
    given = model.recurred(DRAW, EVERY, TOKEN, model.recurrences(DRAW))
    expected = model.cross_entropy(given, TOKEN, None, "mean")
    assert torch.equal(model.conventional_loss(DRAW, EVERY, BATCH), expected)


def test_a_step_has_one_number_and_each_sample_its_own_start():
    model = make()
    assert model.recurrences(replace(DRAW, sample=9)) == model.recurrences(DRAW)
    assert len({model.recurrences(replace(DRAW, step=step)) for step in range(20)}) > 4
    whole = model.conventional_loss(DRAW, EVERY, BATCH)
    parts = [
        model.conventional_loss(replace(DRAW, sample=i), EVERY, {"token": TOKEN[i : i + 1]})
        for i in range(3)
    ]
    torch.testing.assert_close(torch.stack(parts).mean(), whole)
    again = model.conventional_losses(replace(DRAW, sample=1), EVERY, BATCH)
    assert not torch.equal(again[0], model.conventional_losses(DRAW, EVERY, BATCH)[0])


@pytest.mark.parametrize("read_out", ["paper", "posterior"])
def test_tokens_of_one_level_each_are_as_samples_of_one_level(read_out):
    of_sample, of_token = (make(read_out=read_out, levels_of=of) for of in ("sample", "token"))
    level = LEVEL[:, None].expand(TOKEN.shape).contiguous()
    scale = (SCALE[:, None] / 6).expand(TOKEN.shape).double()
    loss = of_token.loss(DRAW, level, scale, EVERY, BATCH, INTERVAL)
    expected = of_sample.loss(DRAW, LEVEL, SCALE, EVERY, BATCH, INTERVAL)
    torch.testing.assert_close(loss, expected)


def test_ends_keep_their_share_of_another_depth_and_may_be_told():
    config = Huginn.preset("paper").resized({"depth": 12})
    assert (config.prelude, config.coda) == (3, 3)
    config = config.resized({"depth": 3, "prelude": 1})
    assert (config.prelude, config.coda) == (1, 0)


def test_the_published_shape_and_what_the_halves_of_the_adapter_are():
    with torch.device("meta"):
        model = Huginn.from_preset("paper")
    config = model.config
    assert (config.prelude, config.depth - config.prelude - config.coda, config.coda) == (2, 4, 2)
    model = Huginn.from_preset("small")
    bound = math.sqrt(6 / (3 * 128))
    for half in (model.from_state, model.from_tokens):
        assert half.weight.abs().max().item() == pytest.approx(bound, rel=0.01)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: replace(CONFIG, prelude=3), "between prelude 3 and coda 2, got 5"),
        (lambda: replace(CONFIG, coda=-1), "coda must be at least 0, got -1"),
        (lambda: replace(CONFIG, recurrences=0), "recurrences must be at least 1, got 0"),
        (lambda: replace(CONFIG, truncation=0), "truncation must be at least 1, got 0"),
        (
            lambda: make().conventional_loss(DRAW, (1, 0, 2), BATCH),
            r"prelude, core and coda in this order, got \[1, 0, 2\]",
        ),
        (
            lambda: make().conventional_loss(Draw(2, torch.tensor(5)), EVERY, BATCH),
            "cuda_graphs must be off where steps differ in how often layers run",
        ),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
