import re
from dataclasses import fields, is_dataclass

import pytest
import torch
from cli.runs import refused

from dbkernels.cli.device import pick_device
from dbkernels.cli.doctor import Doctor
from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.train import PriorFlags, Train, TrainerFlags
from dbkernels.training.run import PartitionConfig

VERBS = {
    "train": Train,
    "sample": Sample,
    "evaluate": Evaluate,
    "profile": Profile,
    "plan": Plan,
    "doctor": Doctor,
}
NESTED = {"partition": PartitionConfig, "prior": PriorFlags, "trainer": TrainerFlags}
POSITIONAL = {"family", "run_dir", "run_dirs"}


def flags_of(verb):
    for field in fields(VERBS[verb]):
        if verb == "train" and field.name in NESTED:
            yield from (inner.name for inner in fields(NESTED[field.name]))
        elif verb in ("profile", "plan") or field.name not in POSITIONAL:
            yield field.name


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("columns", ["80", "120"])
def test_help_has_a_sentence_for_every_flag(cli, monkeypatch, verb, columns):
    monkeypatch.setenv("COLUMNS", columns)
    outcome = cli(verb, "--help")
    text = re.sub(r"[│\s]+", " ", outcome.out)
    assert outcome.code == 0
    for name in flags_of(verb):
        flag = "--" + name.replace("_", "-")
        kind = r"(, --no-[a-z-]+| [A-Z]+| {[^}]+}(\|[A-Z]+)?)"
        found = re.search(rf" {flag}{kind} (.+?\.) \(", text)
        assert found, f"{flag} has no sentence"
        assert "--" not in found[3].replace("--num-blocks", ""), f"{flag} has no sentence"
    assert "dummy" not in text and "(default: )" not in text


def test_nested_flags_are_those_of_the_configuration():
    assert all(is_dataclass(flags) for flags in NESTED.values())
    assert Train(family="vit", out=None).trainer.steps == TrainerFlags().steps


def test_help_names_every_verb(cli):
    outcome = cli("--help")
    assert outcome.code == 0
    for verb in VERBS:
        assert f"• {verb}" in outcome.out


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("train vit --out out --foo 1", "--foo"),
        ("train vit --out out --partition.gamma 1", "--partition.gamma"),
        ("train cnn --out out", "invalid choice 'cnn'"),
        ("train vit", "--out"),
        ("train vit --out out --steps x", "--steps"),
        ("train vit --out out --sharing some", "invalid choice 'some'"),
        ("sample", "PATH"),
        ("sample run --sampler ddim", "invalid choice 'ddim'"),
        ("evaluate run --blocks 3", "--blocks"),
        ("profile --family gpt", "invalid choice 'gpt'"),
        ("plan", "--memory"),
        ("fly", "fly"),
        ("", "Expected one of {train, sample, evaluate, profile, plan, doctor}"),
    ],
)
def test_a_bad_flag_exits_with_2_and_touches_no_file(cli, tmp_path, arguments, message):
    outcome = cli(*arguments.split())
    assert outcome.code == 2
    assert message in outcome.err
    assert outcome.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["data.npz"]


def test_cuda_is_refused_where_there_is_none(cli, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert refused(trained("vit", "out", "--device", "cuda"), "device cuda needs an NVIDIA GPU")
    assert not (tmp_path / "out").exists()
    for verb in (["sample", "out"], ["evaluate", "out"], ["profile", "--measure"]):
        assert refused(cli(*verb, "--device", "cuda"), "device cuda needs an NVIDIA GPU")


@pytest.mark.parametrize(
    "error, line",
    [
        (ValueError("a [bold] word " * 9), "error: " + "a [bold] word " * 9),
        (FloatingPointError("nan"), "error: nan"),
        (PermissionError(13, "Permission denied", "out"), "error: Permission denied: out"),
        (OSError("no name"), "error: no name"),
        (torch.OutOfMemoryError("too large"), "error: too large"),
        (MemoryError("Unable to allocate 3 TiB"), "error: Unable to allocate 3 TiB"),
    ],
)
def test_an_error_is_one_line_as_it_stands(cli, monkeypatch, error, line):
    def fail(self):
        raise error

    monkeypatch.setattr(Profile, "run", fail)
    outcome = cli("profile")
    assert (outcome.code, outcome.err.rstrip()) == (1, line.rstrip())


def test_an_interrupt_ends_quietly(cli, monkeypatch):
    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Profile, "run", interrupt)
    assert cli("profile") == (130, "", "")


def test_a_host_out_of_memory_is_one_line(cli, monkeypatch):
    monkeypatch.setattr(Profile, "run", lambda self: torch.empty(2**62, dtype=torch.uint8))
    outcome = cli("profile")
    assert outcome.code == 1 and outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"error: can't allocate memory: you tried to allocate {2**62}")


@pytest.mark.parametrize("error", [AssertionError("ours"), RuntimeError("ours")])
def test_a_fault_of_ours_keeps_its_traceback(cli, monkeypatch, error):
    def fail(self):
        raise error

    monkeypatch.setattr(Profile, "run", fail)
    with pytest.raises(type(error), match="ours"):
        cli("profile")


# the device


@pytest.mark.parametrize("has_gpu", [False, True])
def test_auto_takes_a_gpu_where_there_is_one_and_the_cpu_can_be_named(has_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert pick_device("auto").type == ("cuda" if has_gpu else "cpu")
    assert pick_device("cpu") == torch.device("cpu")
    for name in ("tpu", "cuda:x", "mps", "meta", ""):
        with pytest.raises(ValueError, match=f"device must be auto, cpu or cuda, got {name}"):
            pick_device(name)


def test_cuda_is_never_replaced_by_the_cpu_or_another_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "cuda:1"):
        with pytest.raises(ValueError, match=f"device {name} needs an NVIDIA GPU"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match="device cuda:2 must be below cuda:2 on this machine"):
        pick_device("cuda:2")
