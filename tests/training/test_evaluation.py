import math
from statistics import NormalDist

import pytest
import torch
from models.tiny import randomise
from torch import nn
from training.tiny import PRIOR, make_blocks, make_data

from dbkernels.data.images import ImageData
from dbkernels.diffusion.prediction import EDM
from dbkernels.models.vit import metrics
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.evaluation import batches


class Known(nn.Module):
    """A classifier whose answers are given; the first pixel of an image is its label."""

    target_parts, sigma_data, prediction = (), 0.5, EDM(0.5)

    def __init__(self, logits=None, loss=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(3))
        self.logits, self.known_loss, self.calls = logits, loss, []

    def z_shape(self, batch):
        return len(batch["label"]), 2

    def level_shape(self, batch):
        return (len(batch["label"]),)

    def denoise(self, z, level, layers, batch):
        self.calls.append((layers, level))
        return self.logits(batch["image"][:, 0, 0, 0].long(), level[0]) if self.logits else z

    def losses(self, draw, level, layers, batch):
        self.calls.append((layers, level))
        return self.known_loss(draw, level, batch) if self.known_loss else level

    def estimate(self, prediction):
        return torch.zeros(len(prediction), 2)


def known(**answers):
    blocks = DiffusionBlocks(Known(**answers), process=PRIOR, weighting="none")
    blocks.metrics = metrics
    return blocks


def labelled(count=10):
    labels = torch.arange(count) % 3
    return ImageData(labels.float().view(-1, 1, 1, 1).expand(-1, 1, 4, 4).numpy(), labels, 3)


def sure(answer):
    return 50.0 * nn.functional.one_hot(answer, 3)


def test_every_sample_comes_once_in_order_and_the_last_batch_is_short():
    data = make_data(10)
    found = list(batches(data, 4, "cpu"))
    assert [(len(batch["label"]), draw.sample) for batch, draw in found] == [(4, 0), (4, 4), (2, 8)]
    image = torch.cat([batch["image"] for batch, _ in found])
    assert torch.equal(image, data.batch(torch.arange(10))["image"])


def test_a_mean_loss_counts_every_sample_once():
    data = labelled()  # labels 0, 1, 2, ..., 0: with batches of four, a mean of means is 1
    blocks = known(loss=lambda draw, level, batch: batch["label"].float())
    assert blocks.loss_at(data, 1.0, seed=0, batch_size=4) == pytest.approx(0.9)


def test_the_noise_of_a_sample_depends_on_the_seed_and_not_on_the_batches():
    blocks, data = randomise(make_blocks("vit")), make_data()
    values = [blocks.loss_at(data, 0.5, seed=1, batch_size=size) for size in (3, 4, 10)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    same, other = (blocks.loss_at(data, 0.5, seed=s, batch_size=3) for s in (1, 2))
    assert values[0] == same != other


def test_a_blocks_loss_is_the_mean_over_eight_quantiles_of_what_it_serves():
    blocks = known(loss=lambda draw, level, batch: level)
    blocks.metrics = None
    losses = blocks.evaluate(labelled()).block_losses
    normal = NormalDist(-1.2, 1.2)
    for block, loss in zip(blocks, losses, strict=True):
        low, high = (normal.cdf(math.log(s)) for s in (block.noise.low, block.noise.high))
        shares = [low + (high - low) * (i + 0.5) / 8 for i in range(8)]
        levels = [math.exp(normal.inv_cdf(share)) for share in shares]
        assert loss == pytest.approx(sum(levels) / 8, rel=1e-5)
    served = [layers for layers, _ in blocks.model.calls]
    assert served == [(0,)] * 8 + [(1,)] * 8 + [(2,)] * 8 + [(0,)]


def classified(blocks, levels, **settings):
    """Accuracy and cross-entropy after each step."""
    metrics = blocks.evaluate(labelled(), levels=levels, batch_size=4, **settings).metrics
    return metrics["accuracy"], metrics["cross_entropy"]


def test_a_model_that_knows_the_answer_is_always_right():
    blocks = known(logits=lambda label, level: sure(label))
    assert blocks.evaluate(labelled()).levels == tuple(PRIOR.grid(3))
    blocks.model.calls.clear()
    accuracy, cross_entropy = classified(blocks, 3)
    assert accuracy == (1.0, 1.0, 1.0)
    assert cross_entropy == pytest.approx((0.0, 0.0, 0.0), abs=1e-6)
    # three batches at 8 levels of each block and at the highest, and at three of the sampler
    assert len(blocks.model.calls) == 3 * (3 * 8 + 1 + 3)


def test_answers_are_read_after_each_step():
    # at first sure of the next class, then of class 0, then of the right one
    answers = {80.0: lambda label: (label + 1) % 3, 1.0: torch.zeros_like, 0.5: lambda label: label}
    blocks = known(logits=lambda label, level: sure(answers[float(level)](label)))
    accuracy, cross_entropy = classified(blocks, list(answers))
    assert accuracy == pytest.approx((0.0, 0.4, 1.0))
    assert cross_entropy == pytest.approx((50.0, 30.0, 0.0), abs=1e-4)


def test_single_starts_are_what_each_of_them_answers_alone():
    blocks, data = randomise(make_blocks("vit")), make_data()
    how = {"levels": 2, "start": "noise", "batch_size": 4}
    found = blocks.evaluate(data, starts=3, **how)
    assert found.starts.keys() == found.metrics.keys()
    assert {len(values) for values in found.starts.values()} == {3}
    assert {len(values) for values in found.metrics.values()} == {2}
    one = blocks.evaluate(data, **how)
    assert one.starts == {}
    # the first of three starts is the start of one
    first = {name: values[0] for name, values in found.starts.items()}
    assert first == pytest.approx({name: values[-1] for name, values in one.metrics.items()})
    assert len({*found.starts["cross_entropy"], found.metrics["cross_entropy"][-1]}) == 4
    shown = str(found).splitlines()[-4:]
    nats = torch.tensor(found.starts["cross_entropy"], dtype=torch.float64)
    assert shown[1].startswith("cross entropy of one start ")
    assert shown[1].endswith(f"  {nats.mean():.4g} ± {nats.std():.1g}")


@pytest.mark.parametrize(("start", "starts"), [("zero", 1), ("noise", 3)])
def test_an_evaluation_tells_how_many_passes_are_done_and_of_how_many(start, starts):
    blocks, told = make_blocks(), []
    how = {"levels": 4, "start": start, "starts": starts, "batch_size": 4}
    blocks.evaluate(make_data(), told=lambda *numbers: told.append(numbers), **how)
    done, totals = zip(*told, strict=True)
    # of ten samples: eight quantiles of each block, the most noise, and the steps of each start
    assert set(totals) == {done[-1]} == {10 * (3 * 8 + 1 + 4 * starts)}
    assert list(done[:3]) == [4, 8, 10] and list(done) == sorted({*done})


def test_the_calibration_error_is_of_all_samples_and_of_each_step():
    # at first always sure of class 0, which four of ten have; then half sure of the right one
    half = {1.0: 0.5, 80.0: 1.0}

    def logits(label, level):
        share = half[float(level)]
        right = nn.functional.one_hot(label if share < 1 else torch.zeros_like(label), 3)
        return (right * share + (1 - right) * (1 - share) / 2).clamp(min=1e-30).log()

    blocks = known(logits=logits)
    found = blocks.evaluate(labelled(), levels=list(half)[::-1], batch_size=4).metrics
    assert found["confidence"] == pytest.approx((1.0, 0.5))
    assert found["accuracy"] == pytest.approx((0.4, 1.0))
    assert found["calibration_error"] == pytest.approx((0.6, 0.5))
    # bins, not batches, are where right answers and wrong ones make up for each other
    blocks.metrics = lambda prediction, batch: {
        "confidence": torch.full((len(prediction),), 0.5),
        "accuracy": (batch["label"] != 1).float(),
    }
    errors = [
        blocks.evaluate(labelled(), levels=[1.0], batch_size=size).metrics["calibration_error"]
        for size in (1, 4, 10)
    ]
    assert errors == [pytest.approx((0.2,))] * 3
    blocks.metrics = lambda prediction, batch: {"accuracy": (batch["label"] != 1).float()}
    assert blocks.evaluate(labelled(), levels=[1.0]).metrics.keys() == {"accuracy"}


def test_an_evaluation_is_a_function_of_the_seed_and_leaves_the_mode_of_training():
    blocks = randomise(make_blocks("vit")).train()
    first, second, other = (
        blocks.evaluate(make_data(), seed=s, batch_size=4, start="noise", starts=2)
        for s in (1, 1, 2)
    )
    assert first == second != other
    assert first.metrics["accuracy"] and first.metrics != other.metrics
    assert blocks.training and blocks.model.training


def test_an_evaluation_prints_a_line_for_each_figure():
    found = make_blocks("vit").evaluate(make_data())
    assert str(found).splitlines() == [
        "loss of each block                 1.099  1.099  1.099",
        "loss at the most noise             1.099",
        "accuracy after each step           0.4  0.4  0.4",
        "cross entropy after each step      1.099  1.099  1.099",
        "confidence after each step         0.3333  0.3333  0.3333",
        "calibration error after each step  0.06667  0.06667  0.06667",
    ]
    assert "accuracy" not in str(make_blocks("dit").evaluate(make_data()))
