"""Figures of a run: of which answers and images each one is."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from dbkernels import DiffusionBlocks, LogNormal
from dbkernels.training.evaluation import Evaluation


def test_accuracies_are_those_of_their_starts(bench):
    measuring = bench("studies.measuring")

    class Blocks:
        def evaluate(self, data, *, samples, start="zero", starts=1):
            metrics, of_starts = {"accuracy": (0.5, 0.75)}, {}
            if start == "noise":
                metrics, of_starts = {"accuracy": (0.25, 0.625)}, {"accuracy": (0.25, 0.5)}
            rest = {"cross_entropy": (2.0, float(starts)), "calibration_error": (0.1, 0.2)}
            return Evaluation((float(samples), 3.0), 4.0, (2.0, 1.0), metrics | rest, of_starts)

    model = SimpleNamespace(open=lambda data, split, convert: range(20 if split == "test" else 99))
    config = SimpleNamespace(family="vit", model=model, data="", convert="none")
    how = {"guidance": 1.0, "judge": None}
    row = measuring.figures(config, Blocks(), sizes=measuring.Sizes(images=15, starts=2), **how)
    assert row == {
        "loss_of_blocks": [15.0, 3.0],
        "loss_at_most_noise": 4.0,
        "accuracy": [0.5, 0.75],
        "cross_entropy": [2.0, 1.0],
        "calibration_error": [0.1, 0.2],
        "accuracy_of_a_start": 0.375,
        "accuracy_between_starts": pytest.approx(0.125 * 2**0.5),
        "accuracy_of_starts": [0.25, 0.625],
    }
    # no more than there are
    row = measuring.figures(config, Blocks(), sizes=measuring.Sizes(images=25), **how)
    assert row["loss_of_blocks"] == [20.0, 3.0]


class Judge:
    """Whose figures tell the levels of the images; a wrong label spoils them."""

    def distance(self, images):
        return float(images[:, 1].mean())

    def accuracy(self, images, labels):
        return float((images[:, 1] - (images[:, 0] != labels).double()).mean())

    def precision_recall(self, images):
        level = float(images[:, 1].mean())
        return level + 1, level + 2


def test_images_are_drawn_on_the_levels_of_the_paper_and_on_close_ones(study, bench, monkeypatch):
    drawn = []

    def sample(self, batch, levels, draw, *, guidance):
        drawn.append((draw.sample, guidance))
        label = batch["label"].double()
        return torch.stack([label, torch.full_like(label, levels[1])], dim=1)

    tiny = bench("studies.scales").SETTINGS["tiny"]
    monkeypatch.setitem(tiny, "dit", [replace(each, guidance=3.0) for each in tiny["dit"]])
    monkeypatch.setattr(DiffusionBlocks, "sample", sample)
    monkeypatch.setattr(bench("studies.running"), "judge_of", lambda place: Judge())
    monkeypatch.setattr(bench("studies.measuring"), "AT_ONCE", 4)
    [row] = study("families", only="dit digits end to end, as deep as a block")
    paper, close = (LogNormal().grid(3, spacing)[1] for spacing in ("cdf", "karras"))
    assert paper != close and drawn == 2 * [(0, 3.0), (4, 3.0), (8, 3.0)]
    expected = {"frechet": paper, "precision": paper + 1, "recall": paper + 2}
    expected |= {"recognised": paper, "frechet_close": close, "recognised_close": close}
    assert {name: row[name] for name in expected} == pytest.approx(expected)
