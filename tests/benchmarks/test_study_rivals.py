"""Baselines as arms of a study: what is trained, on which images it answers, and its row."""

from dataclasses import replace

import numpy as np
import pytest
from cli.runs import write_npz

from dbkernels import Trainer


@pytest.fixture
def trained(bench, monkeypatch):
    """The rivals that studies train, by the name of their arm."""
    running, found = bench("studies.running"), {}
    train = running.train_rival

    def noted(arm, *words, **more):
        found[arm.name] = train(arm, *words, **more)
        return found[arm.name]

    monkeypatch.setattr(running, "train_rival", noted)
    return found


def test_a_rival_answers_on_images_that_it_has_not_seen(study, bench, trained, tmp_path):
    # who has learned to say 1, which is no first answer, is right on a quarter of the others
    random, said = np.random.default_rng(0), {}
    for split, labels in (("", [0] + 23 * [1]), ("test_", [1, 1] + 6 * [0])):
        images = random.integers(0, 256, (len(labels), 1, 8, 8), dtype=np.uint8)
        said |= {f"{split}images": images, f"{split}labels": np.array(labels)}
    path = tmp_path / "digits.npz"
    np.savez(path, **said)
    rows = study("conditioning", data=(f"digits={path}",))
    assert [(row["arm"], row["accuracy"]) for row in rows] == [
        ("with", [0.25]),
        ("without", [0.25]),
    ]
    baselines = bench("baselines.diffusion_blocks_vit")
    kinds = {"with": baselines.DiffusionBlocksViT, "without": baselines.Unconditioned}
    assert {name: type(rival.baseline) for name, rival in trained.items()} == kinds
    assert [row["layers"] for row in rows] == [[2, 1, 1]] * 2


@pytest.mark.parametrize(
    ("name", "layers", "forwards"),
    [
        ("contrastive forward-forward, ViT", [1, 1, 1, 1, 0], 1),  # the head has none
        ("noprop-ct, ViT", [4], 50),
        ("end to end, CNN", [10], 1),  # nets
    ],
)
def test_a_rival_tells_the_layers_of_its_blocks(name, layers, forwards, study):
    [row] = study("baselines", only=f"vit digits {name}")
    assert (row["layers"], row["num_blocks"]) == (layers, len(layers))
    assert (row["arm"], row["forwards"]) == (name, forwards)


def test_a_rival_sees_its_images_moved_where_its_setting_moves_them(
    study, bench, trained, monkeypatch
):
    tiny = bench("studies.scales").SETTINGS["tiny"]
    moved = [replace(each, flags=f"{each.flags} --shift 1") for each in tiny["vit"]]
    study("conditioning", only="vit digits with")
    assert trained["with"].trainer.augment is None
    monkeypatch.setitem(tiny, "vit", moved)
    study("conditioning", only="vit digits with")
    assert trained["with"].trainer.augment is not None


def test_a_rival_that_was_killed_ends_with_the_same_row(study, tmp_path, monkeypatch):
    def row_of(runs):
        [row] = study("baselines", only="vit digits greedy, ViT", runs=tmp_path / runs)
        return {name: value for name, value in row.items() if name != "sweep_ms"}

    launch, last, done = Trainer.launch, None, []

    def counted(self, block):
        if len(done) == last:
            raise KeyboardInterrupt
        done.append(block.index)
        return launch(self, block)

    monkeypatch.setattr(Trainer, "launch", counted)
    whole, steps = row_of("whole"), len(done)
    done.clear()
    last = 3  # steps that it makes
    with pytest.raises(KeyboardInterrupt):
        row_of("killed")
    last = None
    assert row_of("killed") == whole and len(done) == steps > 3


def test_a_rival_of_other_data_is_not_gone_on_with(study, tmp_path):
    asked = {"only": "vit digits greedy, ViT", "runs": tmp_path / "runs"}
    study("baselines", **asked)
    [kept] = (tmp_path / "runs").glob("*/figures.json")
    kept.unlink()  # as if it had been killed before it was measured
    write_npz(tmp_path / "digits.npz", classes=2)
    with pytest.raises(ValueError, match="must be of greedy, ViT and of these data, got another"):
        study("baselines", data=(f"digits={tmp_path / 'digits.npz'}",), **asked)
    assert not kept.exists()
