import math
from dataclasses import dataclass, replace

import pytest
import torch
from models.tiny import CONFIGS, make_model
from torch import nn

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.diffusion.likelihood import gaussian_bound
from dbkernels.diffusion.masked import Masked
from dbkernels.diffusion.prediction import EDM
from dbkernels.models import FAMILIES
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.text_bound import APART, LEAST_LEVELS, curve_levels
from dbkernels.training.text_evaluation import SAMPLED, WINDOWS
from dbkernels.training.text_sampler import PLACES

COUNTS = torch.tensor([8, 6, 3, 2, 1])  # of each word in a window
ODDS = COUNTS / COUNTS.sum()
ENTROPY = -float((ODDS * ODDS.log2()).sum())
PRIOR = LogNormal(-0.5, 0.8, sigma_min=0.1, sigma_max=20.0)


@dataclass(frozen=True)
class Words:
    """Windows in which every word stands as often as its odds say, in an order of their own."""

    count: int = 120
    vocabulary: int = 5
    length: int = 20
    characters_per_token: float = 1.0

    def __len__(self):
        return self.count

    def batch(self, indices, put=lambda tensor: tensor):
        window = torch.arange(5).repeat_interleave(COUNTS)
        rows = [torch.Generator().manual_seed(int(index)) for index in indices]
        token = torch.stack([window[torch.randperm(20, generator=each)] for each in rows])
        return {"token": put(token) % self.vocabulary}


class Exact(nn.Module):
    """Five words of orthogonal rows, and the exact posterior of odds that no context moves."""

    target_parts, sigma_data, independent = (), 0.5, True

    def __init__(self, levels_of="sample", worse=()):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
        self.levels_of, self.worse, self.asked = levels_of, worse, []
        self.noise = []

    def target(self, batch):
        return torch.eye(5)[batch["token"]]

    def unit_table(self):
        return torch.eye(5)

    def z_shape(self, batch):
        return *batch["token"].shape, 5

    def level_shape(self, batch):
        return batch["token"].shape if self.levels_of == "token" else batch["token"].shape[:1]

    def denoise(self, z, level, layers, batch):
        self.asked.append((layers, float(level.flatten()[0]), len(z)))
        # the noise of the first token
        self.noise.append(float((z[0, 0] - self.target(batch)[0, 0])[0] / level.flatten()[0]))
        level = level if level.dim() == 2 else level[:, None]
        logits = ODDS.log() + z / level[..., None] ** 2
        return logits * (0.5 if layers in self.worse else 1.0)

    def estimate(self, prediction):
        return prediction.softmax(-1)

    def conventional_losses(self, draw, layers, batch):
        return -ODDS.log()[batch["token"]].mean(1)

    def losses(self, draw, level, layers, batch):
        self.noise.append(draw.step)
        return level * math.log(27)


def exact(num_blocks=2, *, process=PRIOR, text="gaussian", **model):
    model = Exact(**model)
    model.prediction = EDM(0.5) if process.path else None
    blocks = DiffusionBlocks(model, num_blocks, process=process, weighting="none")
    blocks.text = text
    return blocks


@pytest.mark.parametrize(("num_blocks", "levels_of"), [(1, "sample"), (2, "token"), (4, "sample")])
def test_the_bound_of_an_exact_posterior_is_the_entropy_wherever_it_stops(num_blocks, levels_of):
    found = exact(num_blocks, levels_of=levels_of).evaluate(Words(500), starts=0)
    bound = gaussian_bound(found.curves)
    # noise of 10,000 tokens at each level
    bits = [nats / math.log(2) for nats in bound.nats]
    assert bits == pytest.approx([ENTROPY] * len(bits), abs=0.04)
    assert found.bits == pytest.approx(ENTROPY, abs=0.03)
    assert found.least == pytest.approx(bits[-1]) and found.stop == bound.best[0]
    assert found.most_noise == pytest.approx(ENTROPY, abs=0.003)
    assert len(found.blocks) == len(found.curves) == num_blocks
    assert sum(found.blocks) == pytest.approx(ENTROPY, abs=0.03)
    assert found.sampler is None


def test_the_choice_of_the_stop_makes_the_bound_no_lower():
    """Of 400 tokens, for which the least of all levels is too low by a tenth of a bit."""
    blocks = exact(1)
    found = [blocks.evaluate(Words(20), starts=0, seed=seed) for seed in range(30)]
    least = [gaussian_bound(each.curves).best[1] / math.log(2) for each in found]
    assert sum(least) / 30 < ENTROPY - 0.06
    assert sum(each.bits for each in found) / 30 == pytest.approx(ENTROPY, abs=0.04)


def test_a_block_is_asked_about_its_own_levels_to_both_ends():
    blocks = exact(3)
    found = blocks.evaluate(Words(2), starts=0)
    asked = blocks.model.asked
    for block, curve in zip(blocks, found.curves, strict=True):
        high, low = block.noise.high, block.noise.low
        assert (curve.levels[0], curve.levels[-1]) == (high, low)
        levels = [level for layers, level, _ in asked if layers == block.layers]
        assert levels == pytest.approx(curve.levels, rel=1e-6)
        ratios = [a / b for a, b in zip(curve.levels, curve.levels[1:], strict=False)]
        assert len(levels) >= LEAST_LEVELS and max(map(math.log, ratios)) <= APART + 1e-9
        assert ratios == pytest.approx([ratios[0]] * len(ratios))


def test_levels_of_a_curve_end_where_the_block_does():
    high, low = 0.67664912, 0.30120034
    levels = curve_levels(high, low)
    assert (levels[0], levels[-1], len(levels)) == (high, low, LEAST_LEVELS)


def test_a_worse_block_costs_bits_and_the_best_stop_leaves_it_out():
    good, bad = exact(2), exact(2, worse=[(2, 3)])
    found = [blocks.evaluate(Words(), starts=0) for blocks in (good, bad)]
    assert found[0].blocks[0] == found[1].blocks[0]
    assert found[1].least > found[0].least + 0.1
    assert found[1].bits == pytest.approx(ENTROPY, abs=0.03)
    assert found[1].stop >= next(iter(bad)).noise.low


@pytest.mark.parametrize("process", [Masked(), Masked("cosine"), Masked(eps=0.01)])
@pytest.mark.parametrize("num_blocks", [1, 3])
def test_a_uniform_model_of_masked_tokens_needs_the_bits_of_its_vocabulary(process, num_blocks):
    blocks = exact(num_blocks, process=process, text="masked")
    found = blocks.evaluate(Words(vocabulary=27))
    # no term stands for the share eps that is kept at time 1
    assert found.bits == pytest.approx((1 - process.eps) * math.log2(27), rel=1e-5)
    assert found.blocks == pytest.approx([found.blocks[0]] * num_blocks, rel=1e-5)
    assert (found.stop, found.least, found.most_noise, found.curves) == (None, None, None, ())


def test_a_network_that_masks_tokens_is_bounded_by_all_its_blocks():
    blocks = DiffusionBlocks(make_model("mdm"), 3)
    nn.init.zeros_(blocks.model.head.weight)
    nn.init.zeros_(blocks.model.head.bias)
    data = Words(400, length=CONFIGS["mdm"].length)
    found = blocks.evaluate(data)
    assert found.bits == pytest.approx(math.log2(5), abs=0.03)


@pytest.mark.parametrize(("text", "process"), [("gaussian", PRIOR), ("masked", Masked())])
def test_each_level_of_each_block_has_noise_of_its_own(text, process):
    blocks = exact(2, process=process, text=text)
    blocks.evaluate(Words(1, vocabulary=5), **({"starts": 0} if text == "gaussian" else {}))
    noise = [round(each, 3) for each in blocks.model.noise]
    assert len(set(noise)) == len(noise) >= 16


@pytest.mark.parametrize("text", ["gaussian", "masked", "conventional"])
def test_figures_depend_on_the_seed_and_not_on_how_the_text_is_cut(text):
    if text == "masked":
        blocks, data = DiffusionBlocks(make_model("mdm"), 3), Words(9, length=7)
    else:
        blocks, data = exact(1 if text == "conventional" else 2), Words(9)
    way = blocks.evaluate_conventional if text == "conventional" else blocks.evaluate
    found = [flat(way(data, batch_size=size)) for size in (2, 5, 9)]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert found[2] == pytest.approx(found[0], rel=1e-5)
    again, other = (flat(way(data, batch_size=2, seed=seed)) for seed in (0, 1))
    assert again == found[0]
    assert (other == found[0]) == (text == "conventional")


def flat(found):
    sampled = [found.sampler.bits, found.sampler.once] if found.sampler else []
    rest = [each for each in (found.least, found.most_noise, found.stop) if each is not None]
    return [found.bits, *found.blocks, *rest, *sampled]


@pytest.mark.parametrize("text", ["gaussian", "masked", "conventional"])
def test_a_word_of_several_characters_has_as_many_bits_for_all_of_them(text):
    process = Masked() if text == "masked" else PRIOR
    blocks = exact(1, process=process, text="masked" if text == "masked" else "gaussian")
    way = blocks.evaluate_conventional if text == "conventional" else blocks.evaluate
    one, four = (flat(way(Words(8, characters_per_token=each))) for each in (1.0, 4.0))
    own = [each / 4 for each in one]
    if text == "gaussian":
        own[4] = one[4]  # the stop is a level
    assert four == pytest.approx(own)


def test_the_network_without_noise_has_exact_bits():
    found = exact(1).evaluate_conventional(Words())
    assert found.bits == pytest.approx(ENTROPY) and found.blocks == (found.bits,)
    assert (found.windows, found.tokens, found.stop) == (120, 2400, None)


@pytest.mark.parametrize(("bridge", "low", "high"), [("sample", -0.02, 0.1), ("argmax", 0.5, 9.0)])
def test_the_sampler_of_an_exact_posterior_costs_the_entropy_where_its_bridge_is_exact(
    bridge, low, high
):
    blocks = exact(3)
    found = blocks.evaluate(Words(80), bridge=bridge, starts=200, levels=4).sampler
    assert found.levels == tuple(PRIOR.grid(4)) and found.windows == 10
    assert found.once == pytest.approx(ENTROPY, abs=0.01)
    assert low < found.bits - ENTROPY < high


def test_a_token_that_reads_noisy_ones_is_sampled_beside_the_texts_own(monkeypatch):
    """A token's odds follow the word before it, which it reads off that word's noisy row."""

    class Reads(Exact):
        def denoise(self, z, level, layers, batch):
            before = nn.functional.pad(z[:, :-1], (0, 0, 1, 0)).argmax(-1)
            return nn.functional.one_hot((before + 1) % 5, 5) * 20.0

    class Follows(Words):
        def batch(self, indices, put=lambda tensor: tensor):
            row = torch.arange(20) % 5
            return {"token": put((row + 1).expand(len(indices), 20) % 5)}

    blocks = exact(1)
    blocks.model = Reads()
    entry = replace(FAMILIES["ar"], writes="whole")
    way = {"levels": [0.1], "starts": 20, "samples": 2}
    monkeypatch.setattr("dbkernels.training.text_sampler.family_of", lambda model: entry)
    found = blocks.evaluate(Follows(2), **way).sampler
    assert found.tokens == PLACES and found.bits < 0.01
    monkeypatch.undo()
    # beside the sampler's own tokens, which end anywhere, it knows nothing
    assert blocks.evaluate(Follows(2), **way).sampler.bits > 1.0


def test_a_token_that_reads_its_own_noise_alone_costs_the_same_with_a_window_of_its_own(
    monkeypatch,
):
    monkeypatch.setattr("dbkernels.training.text_sampler.PLACES", 20)
    found = []
    for writes in ("cached", "whole"):
        entry = replace(FAMILIES["ar"], writes=writes)
        monkeypatch.setattr("dbkernels.training.text_sampler.family_of", lambda _, e=entry: e)
        found.append(exact(2).evaluate(Words(16), levels=3, starts=4).sampler)
    assert found[1].bits == pytest.approx(found[0].bits) and found[0].tokens == 40


@pytest.mark.parametrize("levels", [[0.5], [2.0, 0.5]])
def test_tokens_beside_one_that_is_sampled_have_new_noise_of_each_level(monkeypatch, levels):
    """The word after a noisy one: its odds are the mean over that one's noise."""

    class Next(Exact):
        def denoise(self, z, level, layers, batch):
            return 3 * nn.functional.pad(z[:, :-1], (0, 0, 1, 0)).roll(1, -1)

    class InTurn(Words):
        def batch(self, indices, put=lambda tensor: tensor):
            return {"token": put((torch.arange(20) % 5).expand(len(indices), 20))}

    blocks = exact(1)
    blocks.model = Next()
    entry = replace(FAMILIES["ar"], writes="whole")
    monkeypatch.setattr("dbkernels.training.text_sampler.family_of", lambda model: entry)
    found = blocks.evaluate(InTurn(16), levels=levels, starts=150).sampler
    noise = torch.randn(50_000, 5, generator=torch.Generator().manual_seed(1))
    for bits, level in ((found.once, levels[0]), (found.bits, levels[-1])):
        odds = (3 * (torch.eye(5)[0] + level * noise)).softmax(-1)[:, 0].mean()
        assert bits == pytest.approx(-float(odds.log2()), abs=0.06)


def test_a_sampler_has_a_level_for_each_block_and_serves_each_by_its_own():
    blocks = exact(2)
    found = blocks.evaluate(Words(2), starts=3).sampler
    assert found.levels == tuple(PRIOR.grid(2)) == (20.0, 0.1)
    asked = [(layers, pytest.approx(level)) for layers, level, _ in blocks.model.asked[:6]]
    assert asked == [((0, 1), 20.0), ((2, 3), 0.1)] * 3


def test_one_level_asks_once_at_the_most_noise():
    found = exact(1).evaluate(Words(8), levels=1, starts=4).sampler
    assert found.levels == (20.0,) and found.bits == pytest.approx(found.once)


def test_a_word_that_no_start_ends_at_has_half_a_count_of_block_0s_answer():
    """With two starts that end surely, p is (hits + q / 2) / 2.5."""
    blocks = exact(1)
    found = blocks.evaluate(Words(1), levels=[20.0, 0.1], starts=1, bridge="argmax").sampler
    # the one start ends at the likeliest word, of 8 tokens in 20
    q = ODDS.double()
    expected = -(8 * torch.log2((1 + q[0] / 2) / 1.5) + (COUNTS[1:] * (q[1:] / 3).log2()).sum())
    assert found.bits == pytest.approx(float(expected) / 20, rel=0.02)


def test_so_many_windows_are_read_evenly_spaced():
    read = []

    class Watched(Words):
        def batch(self, indices, put=lambda tensor: tensor):
            read.append(indices.tolist())
            return super().batch(indices, put)

    found = exact(1).evaluate(Watched(1000), samples=10, batch_size=16)
    assert (found.windows, found.tokens, found.sampler.windows) == (10, 200, 2)
    assert read == [[0, 500], [*range(0, 1000, 100)]]
    whole = exact(1).evaluate(Words(9))
    assert whole.windows == 9 < WINDOWS and whole.sampler.windows == -(-9 // SAMPLED)


def test_logits_of_many_words_are_formed_for_fewer_windows_at_a_time(monkeypatch):
    monkeypatch.setattr("dbkernels.training.text_bits.MOST_LOGITS", 250)
    blocks = exact(1)
    blocks.evaluate(Words(5), starts=0)
    assert {size for _, _, size in blocks.model.asked} == {2, 1}


def test_an_evaluation_of_text_prints_a_line_for_each_figure():
    found = exact(2).evaluate(Words(16))
    names = [line.split("  ")[0] for line in str(found).splitlines()]
    assert names == [
        "bits per character",
        "where the bound stops",
        "down to the least level",
        "at the most noise",
        "of each block",
        "of the sampler",
        "read",
    ]
    assert "(sample, 2 levels, 32 starts, 2 windows)" in str(found)
    bare = replace(found, stop=None, sampler=None)
    assert len(str(bare).splitlines()) == 3


@pytest.mark.parametrize(
    ("text", "writes"),
    [
        ("gaussian", "cached"),
        ("gaussian", "whole"),
        ("masked", "unmask"),
        ("conventional", "cached"),
    ],
)
def test_an_evaluation_tells_how_many_passes_are_done_and_of_how_many(monkeypatch, text, writes):
    entry = replace(FAMILIES["ar"], writes=writes)
    monkeypatch.setattr("dbkernels.training.text_sampler.family_of", lambda model: entry)
    masked = text == "masked"
    process, kind = (Masked(), "masked") if masked else (PRIOR, "gaussian")
    blocks = exact(1 if text == "conventional" else 2, process=process, text=kind)
    way = blocks.evaluate_conventional if text == "conventional" else blocks.evaluate
    told, model = [], blocks.model
    found = way(Words(9), batch_size=4, told=lambda *numbers: told.append(numbers))
    made = {
        "gaussian": sum(windows for *_, windows in model.asked),
        "masked": 9 * len(model.noise) // 3,  # in three batches
        "conventional": 9,
    }
    done, totals = zip(*told, strict=True)
    assert set(totals) == {done[-1]} == {made[text]}
    assert list(done) == sorted({*done}) and done[0] < 40
    assert way(Words(9), batch_size=4) == found


def test_an_evaluation_leaves_the_mode_of_training():
    blocks = exact(1).train()
    blocks.evaluate(Words(2))
    assert blocks.training


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exact().evaluate(Words(1), start="noise"), "start must be None for Exact, got no"),
        (lambda: exact().evaluate(Words(1), starts=-1), "starts must be at least 0, got -1"),
        (lambda: exact().evaluate(Words(1), bridge="hard"), "bridge must be one of soft, argmax"),
        (lambda: exact().evaluate(Words(1), samples=0), "samples must be at least 1, got 0"),
        (lambda: exact().evaluate(Words(1), levels=0), "levels must be at least 2, got 0"),
        (lambda: exact().evaluate(Words(1), levels=[1.0, 2.0]), "0 <= following < level"),
        (lambda: exact().evaluate(Words(1), levels=[99.0]), "level must lie in"),
        (lambda: exact(text="masked").evaluate(Words(1), levels=2), "levels must be None for Ex"),
        (lambda: exact(text="masked").evaluate(Words(1), bridge="soft"), "bridge must be None"),
        (lambda: exact(text=None).evaluate(Words(1), bridge="soft"), "bridge must be None"),
        (lambda: exact(2).evaluate_conventional(Words(1)), "one block .* got Exact in 2 blocks"),
        (lambda: exact(1, text=None).evaluate_conventional(Words(1)), "got Exact in 1 block"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call()
