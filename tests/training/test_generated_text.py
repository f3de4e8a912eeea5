"""Text of trained blocks: what is kept of known tokens changes none, and each has the right law."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from models.tiny import randomise
from torch import nn
from training.tiny import make_blocks

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.masked import MASK
from dbkernels.diffusion.sharpen import sharpened
from dbkernels.models import AR, ARConfig, Huginn, HuginnConfig, cached
from dbkernels.models.reading import WholeReader
from dbkernels.ops import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.generated_text import GeneratedText, text_levels
from dbkernels.training.partition import block_at

CONFIG = ARConfig(
    dim=8, depth=6, num_heads=2, mlp_hidden=6, cond_dim=5, length=9, vocabulary=7, sigma_data=0.7
)
PROCESS = LogNormal(mean=-0.55, std=0.8, sigma_min=0.05, sigma_max=8.0)
DRAW = Draw(seed=5, step=3)


def make(num_blocks=3, noise_order="first", sharing="joint", layers=None, **settings):
    torch.manual_seed(1)
    model = randomise(AR(replace(CONFIG, **settings)), 0.4).double()
    how = {"noise_order": noise_order, "sharing": sharing, "layers": layers}
    blocks = DiffusionBlocks(model, num_blocks, process=PROCESS, **how)
    for copy in blocks.copies:
        randomise(nn.ModuleList([copy.clean_table, copy.head, copy.condition]), 0.4)
    return blocks.eval()


def prompts(B=3, P=2):
    return torch.randint(0, 7, (B, P), generator=torch.Generator().manual_seed(1))


def drawn(text):
    return torch.cat(list(text), dim=1)


def read_whole(text):
    """The same text by a model that reads every token again for each."""
    text._readers = {model: WholeReader(model, text.draw) for model in text._readers}
    return drawn(text)


MODES = [
    {"num_blocks": n, "noise_order": order, "clean": clean, "read_out": read, "noisy_input": z}
    for n in (1, 2, 3)
    for order, clean, read, z in [
        ("first", "own", "paper", "z"),
        ("deepest", "own", "posterior", "z_and_clean"),
        ("first", "through", "posterior", "z"),
        ("deepest", "through", "paper", "z_and_clean"),
    ]
]
OTHERS = [
    {"sharing": "copies"},
    {"layers": [0, 1, 0, 1, 2, 5, 5], "clean": "own"},
    {"layers": [0, 1, 0, 1, 2, 5, 5], "clean": "through"},
]


@pytest.mark.parametrize("mode", [*MODES, *OTHERS], ids=str)
@pytest.mark.parametrize(
    ("count", "settings"),
    [
        (None, {"bridge": "sample", "temperature": 0.8}),
        (7, {"bridge": "soft", "top_p": 0.7}),
        # a block or two are not asked
        (2, {"bridge": "argmax"}),
    ],
)
def test_what_is_kept_of_known_tokens_changes_none_that_is_drawn(mode, count, settings):
    blocks = make(**mode)
    # a window of 9 is full after 7 tokens, and begins anew
    given = {"levels": text_levels(blocks, count), **settings}
    text = GeneratedText(blocks, prompts(), 9, DRAW, **given)
    found = drawn(text)
    assert found.shape == (3, 9) and len(found.unique()) > 1
    assert torch.equal(read_whole(text), found)


@pytest.mark.parametrize("P", [0, 2, 8])
def test_a_conventional_network_draws_the_next_token_from_what_is_kept(P):
    text = GeneratedText(make(1), prompts(P=P), 12, DRAW, conventional=True, top_p=0.9)
    found = drawn(text)
    assert len(found.unique()) > 1 and torch.equal(read_whole(text), found)
    sure = GeneratedText(make(1), prompts(P=P), 3, DRAW, conventional=True, temperature=0.0)
    other = replace(DRAW, seed=6)
    again = GeneratedText(make(1), prompts(P=P), 3, other, conventional=True, temperature=0.0)
    assert torch.equal(drawn(sure), drawn(again))


@pytest.mark.parametrize("conventional", [False, True])
def test_a_text_depends_on_its_own_place_in_the_draw_alone(conventional):
    blocks = make(1 if conventional else 3)

    def of(places, **draw):
        given = prompts()[places], 6, replace(DRAW, **draw)
        return drawn(GeneratedText(blocks, *given, conventional=conventional))

    whole = of(slice(0, 3))
    assert torch.equal(torch.cat([of(slice(i, i + 1), sample=i) for i in range(3)]), whole)
    assert not torch.equal(of(slice(0, 3), seed=6), whole)
    assert not torch.equal(of(slice(0, 3), step=4), whole)


RECURRENT = HuginnConfig(
    dim=8, depth=3, num_heads=2, mlp_hidden=6, cond_dim=5, length=9, vocabulary=7, sigma_data=0.7,
    prelude=1, coda=1, recurrences=3, truncation=1,
)  # fmt: skip


def recurrent():
    torch.manual_seed(1)
    model = randomise(Huginn(RECURRENT), 0.4).double()
    return DiffusionBlocks(model, 1, process=PROCESS).eval()


def test_states_of_known_tokens_have_their_own_noise_of_the_level_whenever_it_comes(monkeypatch):
    blocks, met = recurrent(), []
    denoise = blocks.model.denoise

    def watched(z, level, layers, batch):
        met.append((z - blocks.model.target(batch), float(level[0])))
        return denoise(z, level, layers, batch)

    monkeypatch.setattr(blocks.model, "denoise", watched)
    text = GeneratedText(blocks, prompts(P=3), 3, DRAW, levels=[2.0, 0.5])
    found = drawn(text)
    # of the three tokens of the prompt
    first, second, *later = [noise[:, :3] / level for noise, level in met]
    assert not torch.equal(first, second)
    for place, noise in enumerate(later):
        torch.testing.assert_close(noise, (first, second)[place % 2], rtol=0, atol=1e-12)
    assert first.std() == pytest.approx(1, abs=0.2)
    # the token that is being drawn starts as noise of its own
    starts = torch.cat([met[0][0][:, 3], met[2][0][:, 4]]) / 2
    assert not any(
        torch.isclose(starts, row, atol=0.05).all(-1).any() for row in first.flatten(0, 1)
    )
    alone = GeneratedText(blocks, prompts(P=3)[1:], 3, replace(DRAW, sample=1), levels=[2.0, 0.5])
    assert torch.equal(drawn(alone), found[1:])


def test_recurrences_without_noise_draw_the_next_token_too():
    text = GeneratedText(recurrent(), prompts(), 12, DRAW, conventional=True)
    assert len(drawn(text).unique()) > 1 and text.cache_bytes == 0


def test_a_window_that_is_full_begins_anew_with_its_last_half():
    blocks = make()
    found = torch.cat([prompts(), drawn(GeneratedText(blocks, prompts(), 11, DRAW))], dim=1)
    # places 5 to 8 of the first window are the first four of the next
    rest = GeneratedText(blocks, found[:, 5:9], 4, replace(DRAW, step=DRAW.step + 7))
    assert torch.equal(drawn(rest), found[:, 9:])


@pytest.mark.parametrize(
    ("mode", "rows"),
    [
        # the newest clean token and the noisy one together, in every layer once
        ({"clean": "own"}, {(layer, 2): 1 for layer in range(6)}),
        ({"clean": "own", "noise_order": "deepest"}, {(layer, 2): 1 for layer in range(6)}),
        ({"clean": "through"}, {(layer, 2): 1 for layer in range(6)}),
        # the block of the most noise reads what the layers before it made of the clean token
        (
            {"clean": "through", "noise_order": "deepest"},
            {(layer, n): 1 for layer in range(4) for n in (1, "noisy")} | {(4, 2): 1, (5, 2): 1},
        ),
    ],
    ids=str,
)
def test_each_block_is_read_once_for_a_token_with_a_level_for_each(monkeypatch, mode, rows):
    blocks, met = make(**mode), Counter()
    plain = cached.cached_layer

    def counted(layer, x, modulation, rotary, cache, *, first, answers):
        index = next(i for i, each in enumerate(blocks.model.layers) if each is layer)
        clean = torch.equal(rotary, text_rotary[:, first : first + 1])
        met[index, 2 if x.shape[1] == 2 else 1 if clean else "noisy"] += 1
        return plain(layer, x, modulation, rotary, cache, first=first, answers=answers)

    text = GeneratedText(blocks, prompts(), 3, DRAW)
    text_rotary = next(iter(text._readers.values()))._rotary
    steps = iter(text)
    next(steps)
    monkeypatch.setattr(cached, "cached_layer", counted)
    for _ in range(2):
        met.clear()
        next(steps)
        assert met == rows


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
@pytest.mark.parametrize("clean", ["own", "through"])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_the_cache_is_that_of_an_ordinary_model(dtype, size, clean, num_blocks):
    blocks = make(num_blocks, clean=clean).to(dtype)
    text = GeneratedText(blocks, prompts(), 1, DRAW)
    slots = CONFIG.length + 1  # the last is that of the noisy token
    assert text.cache_bytes == 2 * CONFIG.depth * CONFIG.dim * slots * size * len(prompts())
    # without a level of its own a block is not asked, and keeps nothing
    fewer = GeneratedText(blocks, prompts(), 1, DRAW, levels=[8.0])
    assert fewer.cache_bytes == text.cache_bytes // num_blocks


ODDS = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.05], dtype=torch.float64)


def exact():
    """Blocks whose probabilities are those of five words, given z, whatever came before."""
    torch.manual_seed(1)
    model = AR(replace(CONFIG, vocabulary=5, depth=2, read_out="posterior"))
    with torch.no_grad():
        model.target_table.weight.copy_(torch.eye(5, 8))
        model.head.linear.weight[:, 0] = ODDS.log()
        # (1 + scale) rms(h) + shift is 1, 0, 0 ...
        model.head.modulation.linear.bias.copy_(torch.tensor([1.0] + 7 * [0.0] + 8 * [-1.0]))
    return DiffusionBlocks(model, 2, process=LogNormal()).eval()


def chi_square(expected=ODDS, count=20_000, **settings):
    prompt = torch.zeros(count, 0, dtype=torch.int64)
    tokens = drawn(GeneratedText(exact(), prompt, 1, DRAW, **settings))
    counts = torch.bincount(tokens.flatten(), minlength=5)
    there = expected > 0
    assert counts[~there].sum() == 0
    expected = expected[there] * count
    return float(((counts[there] - expected) ** 2 / expected).sum())


def test_the_bridge_sample_keeps_the_law_of_an_exact_posterior_and_the_others_do_not():
    # one in a thousand of a chi-square of four degrees is above 18.5
    levels = text_levels(exact(), 4)
    assert chi_square(levels=levels) < 18.5
    assert chi_square(levels=text_levels(exact(), 4, stop=0.15)) < 18.5
    assert chi_square(levels=levels, bridge="soft") > 30
    assert chi_square(levels=levels, bridge="argmax") > 1000


@pytest.mark.parametrize("bridge", ["sample", "soft", "argmax"])
@pytest.mark.parametrize(("temperature", "top_p"), [(0.5, None), (None, 0.6), (2.0, 0.8)])
def test_what_the_first_level_says_is_sharpened_and_then_stays(bridge, temperature, top_p):
    # of a row that was drawn, z at 0.05 says no other
    expected = sharpened(ODDS, temperature or 1.0, top_p or 1.0)
    told = {"bridge": bridge, "temperature": temperature, "top_p": top_p}
    assert chi_square(expected, levels=[80.0, 0.05], **told) < 18.5


def masked(**settings):
    """Blocks of the masked family, windows of 24 tokens of 3 words, which are no pattern."""
    return randomise(make_blocks("mdm", **settings).eval(), 0.4)


def test_masked_tokens_open_behind_the_prompt_by_the_block_of_their_share(monkeypatch):
    blocks, met = masked(), []
    denoise = blocks.model.denoise

    def watched(z, level, layers, batch):
        met.append((z.clone(), float(level[0]), layers))
        return denoise(z, level, layers, batch)

    monkeypatch.setattr(blocks.model, "denoise", watched)
    prompt = prompts(2, 6) % 3
    text = GeneratedText(blocks, prompt, 30, DRAW, levels=[0.9, 0.6, 0.3])
    first, second = text
    assert first.shape == (2, 18) and second.shape == (2, 12) and first.min() >= 0
    # the last half of a window stands before the next one
    known = [prompt, torch.cat([prompt, first], dim=1)[:, 12:]]
    for step, (z, level, layers) in enumerate(met):
        window, place = divmod(step, 3)
        size = known[window].shape[1]
        assert torch.equal(z[:, :size], known[window])
        assert place or (z[:, size:] == MASK).all()
        # a network expects as many masked tokens as there are, and its block serves that share
        assert level == pytest.approx([0.9, 0.6, 0.3][place] * (1 - size / 24))
        assert layers == block_at(blocks, level).layers
    assert len(met) == 6


def test_masked_text_depends_on_its_own_place_in_the_draw_alone():
    prompt = prompts(3, 2) % 3
    whole = drawn(GeneratedText(masked(), prompt, 40, DRAW))
    alone = [
        drawn(GeneratedText(masked(), prompt[i : i + 1], 40, replace(DRAW, sample=i)))
        for i in range(3)
    ]
    assert torch.equal(torch.cat(alone), whole)
    sure = drawn(GeneratedText(masked(), prompt, 40, DRAW, temperature=0.0))
    assert not torch.equal(sure, whole)


def test_levels_are_one_for_each_block_unless_told_otherwise():
    assert text_levels(make(3)) == PROCESS.grid(3)
    assert text_levels(make(1)) == PROCESS.grid(4)
    assert text_levels(make(3), 1) == [8.0]
    assert text_levels(make(3), 5, spacing="karras") == PROCESS.grid(5, "karras")
    assert text_levels(make(3), 3, stop=0.05) == pytest.approx(PROCESS.grid(3), rel=1e-6)
    first, middle, last = text_levels(make(3), 3, stop=0.2)
    assert (first, last) == (8.0, pytest.approx(0.2))
    assert 2 * PROCESS.cdf(middle) == pytest.approx(PROCESS.cdf(8.0) + PROCESS.cdf(0.2))
    assert text_levels(masked()) == masked().process.grid(24)
    assert text_levels(masked(), 7, spacing="cosine") == masked().process.grid(7, "cosine")


def text(blocks=None, prompt=None, count=3, **settings):
    return GeneratedText(
        blocks or make(), prompts() if prompt is None else prompt, count, DRAW, **settings
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: text(make_blocks("vit")), "blocks must be of a model of text, got ViT"),
        (lambda: text(count=0), "count must be at least 1, got 0"),
        (lambda: text(prompt=prompts(P=9)), "fewer tokens than the model's window, 9, got 9"),
        (lambda: text(prompt=torch.tensor([[1, 7]])), "the prompt has id 7 at token 1.* in .0, 7"),
        (lambda: text(prompt=torch.zeros(2)), "prompt must be .B, P. int64, got"),
        (lambda: text(temperature=0.0), "temperature must be above 0 with the bridge sample"),
        (lambda: text(temperature=-1.0), "temperature must be finite and at least 0, got -1.0"),
        (lambda: text(top_p=0.0), "top_p must be in .0, 1., got 0.0"),
        (lambda: text(bridge="hard"), "bridge must be one of soft, argmax, sample, got hard"),
        (lambda: text(levels=[9.0, 1.0]), "level must lie in .0.05, 8.0., got 9.0"),
        (lambda: text(levels=[1.0, 2.0]), "levels must be descending"),
        (lambda: text(conventional=True), "conventional must be False but for one block"),
        (lambda: text(make(1), conventional=True, levels=[1.0]), "levels must not be given"),
        (lambda: text(make(1), conventional=True, bridge="soft"), "bridge must not be given"),
        (lambda: text(masked(), prompts() % 3, bridge="soft"), "bridge must not be given"),
        (lambda: text(masked(num_blocks=1), prompts() % 3, conventional=True), "must be False"),
        (lambda: text_levels(make(), 0), "levels must be at least 1, got 0"),
        (lambda: text_levels(make(), stop=8.0), "stop must be from 0.05 to less than 8.0, got 8.0"),
        (lambda: text_levels(make(), stop=0.1, spacing="karras"), "spacing must be cdf"),
        (lambda: text_levels(make(), spacing="cosine"), "spacing must be cdf or karras"),
        (lambda: text_levels(masked(), stop=0.1), "stop must not be given where tokens"),
        (lambda: text_levels(make_blocks("dit")), "blocks must be of a model of text, got DiT"),
    ],
)  # fmt: skip
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
