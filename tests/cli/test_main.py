import re
from dataclasses import fields, is_dataclass
from typing import get_args
from unittest import mock

import pytest
import torch

from dbkernels.cli.device import pick_device
from dbkernels.cli.main import Verb
from dbkernels.cli.profile import Profile

VERBS = {verb.__name__.lower(): verb for verb in get_args(Verb)}


def flags_of(config):
    """The names of all fields, those of nested configurations in their place."""
    for field in fields(config):
        if is_dataclass(field.type):
            yield from flags_of(field.type)
        else:
            yield field.name


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_has_a_sentence_for_every_flag(cli, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", columns)
    outcome = cli(f"{verb} --help")
    text = re.sub(r"[│\s]+", " ", outcome.out)
    assert outcome.code == 0
    positional = {"run_dir", "run_dirs", "inputs", *(["family"] if verb == "train" else [])}
    for name in set(flags_of(VERBS[verb])) - positional:
        # a word of Python names the flag
        flag = "--" + {"source": "from"}.get(name, name.replace("_", "-"))
        kind = r"(, --no-[a-z-]+| [A-Z]+| {[^}]+}(\|[A-Z]+)?)"
        found = re.search(rf" {flag}{kind} (.+?\.) \(", text)
        assert found, f"{flag} has no sentence"
        assert "--" not in found[3].replace("--num-blocks", "").replace("evaluate --start", ""), (
            f"{flag} has no sentence"
        )
    assert "dummy" not in text and "(default: )" not in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("train vit --out out --foo 1", "--foo"),
        ("train vit --out out --partition.gamma 1", "--partition.gamma"),
        ("train cnn --out out", "invalid choice 'cnn'"),
        ("train vit", "--out"),
        ("train vit --out=", "a path must not be empty"),
        ("sample run --out=", "a path must not be empty"),
        ("profile --write=", "a path must not be empty"),
        ("train vit --out out --steps x", "--steps"),
        ("train vit --out out --sharing some", "invalid choice 'some'"),
        ("sample", "PATH"),
        ("sample run --sampler ddim", "invalid choice 'ddim'"),
        ("evaluate run --blocks 3", "--blocks"),
        ("tokenize text.txt --tokenizer bytes", "--out"),
        ("tokenize text.txt --out out --documents page", "invalid choice 'page'"),
        ("profile --family gpt", "invalid choice 'gpt'"),
        ("fly", "fly"),
        ("", "Expected one of {train, merge, sample, evaluate, tokenize, profile, plan,"),
    ],
)
def test_a_bad_flag_exits_with_2_and_touches_no_file(cli, tmp_path, arguments, message):
    outcome = cli(arguments)
    assert outcome.code == 2 and outcome.out == ""
    assert message in outcome.err
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


TOO_LARGE = f"can't allocate memory: you tried to allocate {2**62}"


@pytest.mark.parametrize(
    ("effect", "code", "line"),
    [
        (ValueError("a [bold] word " * 9), 1, "error: " + "a [bold] word " * 9),
        (FloatingPointError("nan"), 1, "error: nan"),
        (PermissionError(13, "Denied", "out"), 1, "error: Denied: out"),
        (OSError("no name"), 1, "error: no name"),
        (torch.OutOfMemoryError("too large"), 1, "error: too large"),
        (MemoryError("Unable to allocate"), 1, "error: Unable to allocate"),
        (lambda: torch.empty(2**62, dtype=torch.uint8), 1, f"error: {TOO_LARGE}"),
        (KeyboardInterrupt, 130, ""),
    ],
)
def test_an_error_is_one_line_and_an_interrupt_is_none(cli, monkeypatch, effect, code, line):
    monkeypatch.setattr(Profile, "run", mock.Mock(side_effect=effect))
    outcome = cli("profile")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (code, "", bool(line))
    assert re.sub(r" bytes\. Error code.*", "", outcome.err).rstrip() == line.rstrip()


@pytest.mark.parametrize("error", [AssertionError("ours"), RuntimeError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(cli, monkeypatch, error):
    monkeypatch.setattr(Profile, "run", mock.Mock(side_effect=error))
    with pytest.raises(type(error), match="ours"):
        cli("profile")


NO_DEVICE = "device must be auto, cpu or cuda, got "
NO_GPU = "device {} needs an NVIDIA GPU, got a machine without one"


@pytest.mark.parametrize(
    ("gpus", "name", "expected"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda:1", "cuda:1"),
        (2, "cuda:2", "device cuda:2 must be below cuda:2 on this machine"),
        # it is never replaced by the CPU
        *((0, name, NO_GPU.format(name)) for name in ("cuda", "cuda:1")),
        *((2, name, NO_DEVICE + name) for name in ("tpu", "cuda:x", "mps", "meta", "")),
    ],
)
def test_a_device_is_the_one_that_is_named_or_refused(monkeypatch, gpus, name, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    if expected.startswith("device"):
        with pytest.raises(ValueError, match=expected):
            pick_device(name)
    else:
        assert pick_device(name) == torch.device(expected)
