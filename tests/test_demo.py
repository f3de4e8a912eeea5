import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkout_tools import ROOT, tool

from dbkernels.memory.units import in_words

LEVELS = "LEVELS, GUIDANCE = 30"  # of the sampler, which a test does not wait for
FEW = ["--classifier-steps", "2", "--generator-steps", "2", "--per-class", "8", "--seeds", "2"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a demo of a few steps prints at 80 columns, and its folder; everything is set up."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tools", checkout / "tools")
    train = (ROOT / "tools" / "demo_train.py").read_text()
    assert LEVELS in train
    (checkout / "tools" / "demo_train.py").write_text(train.replace(LEVELS, "LEVELS, GUIDANCE = 3"))
    (checkout / "tools" / "setup.sh").write_text("")
    (checkout / "benchmarks").symlink_to(ROOT / "benchmarks")
    python = checkout / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nPYTHONPATH={ROOT}:$PYTHONPATH exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    command = ["env", "COLUMNS=80", "bash", str(checkout / "tools" / "demo.sh"), *FEW]
    done = subprocess.run(command, cwd=checkout.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    [folder] = (checkout / "runs" / "demo").iterdir()
    return done, folder


@pytest.fixture
def rows(finished):
    return tool("report_rows").read([finished[1]])


def test_writes_a_row_for_each_model_that_the_report_reads(rows):
    models = [(row["family"], row["num_blocks"]) for row in rows]
    assert models == [("vit", 1), ("vit", 3), ("dit", 1), ("dit", 3)]
    for row in rows:
        assert (row["updates"], row["command"]) == (2, "bash tools/demo.sh")
        assert [len(losses) for losses in row["loss"]] == [2] * row["num_blocks"]
        assert ("frechet" in row) == (row["family"] == "dit") != ("accuracy" in row)
        if row["family"] == "vit":
            assert row["seeds"] == 2 and row["final_accuracy"] == row["accuracy"][-1]
            for name in ("accuracy", "accuracy_from_noise"):
                assert len(row[name]) == len(row[f"{name}_spread"]) == 3
        else:
            assert row["seeds"] == 1


def test_one_of_three_blocks_keeps_about_a_third_for_its_backward(rows):
    for whole, blocks in (rows[:2], rows[2:]):
        assert blocks["saved_bytes"] <= 0.36 * whole["saved_bytes"]
        assert blocks["peak_bytes"] < whole["peak_bytes"]


def test_the_terminal_shows_every_figure_at_80_columns_and_where_the_page_is(finished, rows):
    text, folder = finished[0].stdout, finished[1]
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert str(folder.relative_to(folder.parents[2]) / "report.html") in text
    words = " ".join(re.sub("[│┃]", " ", text).split())
    for row in rows:
        assert in_words(row["peak_bytes"]) in words
    assert re.search("the same +from", text) and " ± " in words
    [right] = re.findall(r"classifier is right on ([\d.]+) % of unseen digits", words)
    assert float(right) > 90


def test_what_is_done_so_far_is_told_in_a_pipe(finished):
    lines = finished[0].stderr.splitlines()
    assert re.match(r"training \d+ of 144 updates of layers.*: 0 of 6 models are trained", lines[0])
    assert lines[-1] == "training 144 of 144 updates of layers: 6 of 6 models are trained"


def test_the_page_needs_nothing_from_outside_and_says_where_its_figures_come_from(finished, rows):
    page = (finished[1] / "report.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,', page)) == 2
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert "Fréchet distance" in page and "FID" not in page
    assert f"commit {rows[0]['commit'] or 'unknown'}" in page
    assert "<code>bash tools/demo.sh</code>" in page
    assert "<td>recognised as asked</td>" in page and '<th class="number">DiT, 3 blocks' in page


def test_digits_stand_in_the_line_of_their_class():
    demo = tool("demo")
    labels = torch.arange(10).repeat(12)
    places = demo._in_rows(labels)
    assert labels[places].tolist() == torch.arange(10).repeat_interleave(demo.SHOWN).tolist()
    images = torch.rand(len(places), 1, 4, 5)
    [axes] = demo.digits_picture({"some": images, "more": images}).axes[:1]
    drawn = torch.tensor(axes.images[0].get_array())
    assert drawn.shape == (10 * 4, demo.SHOWN * 5)
    assert torch.equal(drawn[8:12, 15:20], images[2 * demo.SHOWN + 3, 0])


def test_losses_are_stored_as_means_over_neighbouring_steps():
    assert tool("demo_train")._means([1.0, 2.0]) == [1.0, 2.0]
    means = tool("demo_train")._means([float(step) for step in range(101)])
    assert len(means) == 34 and means[:2] == [1.0, 4.0] and means[-1] == 99.5
