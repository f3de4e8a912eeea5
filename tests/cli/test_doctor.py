import json

import pytest
import torch

from dbkernels.cli import doctor
from dbkernels.ops.backend import library as compiled
from dbkernels.ops.backend import toolchain
from dbkernels.ops.backend.register import registered

MANIFEST = compiled.Manifest("0" * 64, 13, (80, 90))


@pytest.fixture
def machine(monkeypatch):
    """Pretends to a library, its CUDA kernels, a GPU and the compilers of a machine."""

    def pretend(
        library, *, gpu_reason="none", kernels=(), compiler=("c++",), nvcc=None, c_compiler="gcc"
    ):
        monkeypatch.setattr(compiled, "library", lambda: library)
        monkeypatch.setattr(compiled, "serves", lambda op, device: (op, device.type) in kernels)
        monkeypatch.setattr(compiled, "has_kernel", lambda op, kind: (op, kind) in kernels)
        monkeypatch.setattr(compiled, "cuda_reason", lambda device: gpu_reason)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_reason != "none")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        monkeypatch.setattr(toolchain, "compiler", lambda: compiler and list(compiler))
        monkeypatch.setattr(toolchain, "c_compiler", lambda: c_compiler and [c_compiler])
        monkeypatch.setattr(toolchain, "nvcc", lambda: nvcc)
        monkeypatch.setattr(doctor, "_version", lambda command: command and f"{command[0]} 12.2")

    return pretend


def line(outcome, name):
    (found,) = [text for text in outcome.out.splitlines() if text.startswith(name)]
    return found.removeprefix(name).strip()


def cells(outcome, op):
    (found,) = [text for text in outcome.out.splitlines() if text.startswith(f" {op} ")]
    return [cell.strip() for cell in found.split("│")[1:]]


def test_names_what_is_here_and_what_runs_each_op(cli, machine):
    kernels = {("gelu_fwd", "cpu"), ("gelu_bwd", "cpu"), ("swiglu_fwd", "cpu")}
    machine(compiled.Library(None, manifest=MANIFEST), kernels=kernels | {("gelu_fwd", "cuda")})
    outcome = cli("doctor")
    assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80
    assert line(outcome, "torch") == torch.__version__
    assert line(outcome, "NVIDIA GPU") == line(outcome, "nvcc") == "none"
    assert line(outcome, "C++ compiler") == "c++ 12.2"
    assert line(outcome, "compiled library") == "loaded, for CPUs and for GPUs of sm_80, sm_90"
    assert cells(outcome, "gelu") == ["cpp", "cuda, backward triton"]
    assert cells(outcome, "swiglu") == ["cpp, backward torch", "triton"]
    assert cells(outcome, "add_noise") == ["torch", "triton"]
    assert "if there were one" in outcome.out and "To build it" not in outcome.out


def test_says_what_a_missing_library_costs_and_the_command_that_builds_it(cli, machine):
    machine(compiled.Library("It was left out: no compiler."), compiler=None)
    outcome = cli("doctor")
    assert outcome.code == 0
    assert line(outcome, "compiled library") == "It was left out: no compiler."
    assert line(outcome, "C++ compiler") == "none"
    assert "every op runs in plain torch on a CPU and in Triton on a GPU." in outcome.out
    assert "install a C++ compiler, such as g++, and then run:" in outcome.out
    assert outcome.out.count("setup.py build_ext --inplace\n") == 1


@pytest.mark.parametrize("c_compiler", ["gcc", None])
def test_says_that_triton_needs_a_c_compiler_where_there_is_none(cli, machine, c_compiler):
    machine(compiled.Library(None, manifest=MANIFEST), c_compiler=c_compiler)
    outcome = cli("doctor")
    assert line(outcome, "C compiler") == ("gcc 12.2" if c_compiler else "none")
    assert ("no op\nruns in Triton on a GPU" in outcome.out) == (c_compiler is None)
    assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80


def test_an_installation_without_sources_is_built_by_pip(cli, machine, monkeypatch, tmp_path):
    machine(compiled.Library("It was left out: no compiler."))
    monkeypatch.setattr(compiled, "CSRC", tmp_path / "csrc")
    fix = json.loads(cli("doctor", "--json").out)["library"]["fix"]
    assert fix.endswith(
        "-m pip install --no-build-isolation --no-deps --force-reinstall path/to/the/checkout"
    )


def test_what_the_build_needs_is_installed_first(cli, machine, monkeypatch):
    machine(compiled.Library("It was left out: ninja is not here."))
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    fix = json.loads(cli("doctor", "--json").out)["library"]["fix"]
    assert " -m pip install ninja 'setuptools>=77' && cd " in fix


def test_a_processor_that_could_not_run_it_gets_no_command(cli, machine, monkeypatch):
    machine(compiled.Library("This processor has no AVX2.", manifest=MANIFEST))
    monkeypatch.setattr(compiled, "processor_serves", lambda: False)
    outcome = cli("doctor")
    assert outcome.code == 0 and "To build it" not in outcome.out


def test_a_library_that_is_there_and_does_not_serve_ends_with_1(cli, machine):
    machine(compiled.Library("libdbkernels.so does not load: [x].", True, MANIFEST))
    outcome = cli("doctor")
    assert outcome.code == 1
    assert line(outcome, "compiled library") == "broken: libdbkernels.so does not load: [x]."


def test_a_gpu_that_the_library_does_not_serve_is_explained(cli, machine):
    library = compiled.Library(None, manifest=MANIFEST._replace(cuda=0, architectures=()))
    machine(library, gpu_reason="CUDA kernels were left out: no nvcc was found.", nvcc="nvcc")
    outcome = cli("doctor")
    assert line(outcome, "NVIDIA GPU") == "H100, sm_90"
    assert line(outcome, "compiled library") == "loaded, for CPUs and for no GPU"
    assert "Nothing of it serves the GPU: CUDA kernels were left out" in outcome.out
    assert "To build it" in outcome.out and "if there were one" not in outcome.out


def test_a_gpu_that_is_served_needs_no_command(cli, machine):
    machine(compiled.Library(None, manifest=MANIFEST), gpu_reason=None, nvcc="nvcc")
    report = json.loads(cli("doctor", "--json").out)
    assert report["gpu"] == {"name": "H100", "sm": "90", "reason": None}
    assert report["library"]["fix"] is None


def test_json_is_one_object_with_every_op(cli):
    outcome = cli("doctor", "--json")
    report = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert report.keys() >= {"python", "torch", "triton", "gpu", "compiler", "nvcc", "library"}
    assert report["ops"].keys() == set(registered())
    assert outcome.code == int(report["library"]["broken"])


@pytest.mark.parametrize(
    ("said", "version"),
    [("c++ (Debian 12.2.0-14) 12.2.0", "12.2.0"), ("release 13.0, V13.0.88", "13.0"), ("", None)],
)
def test_a_compiler_is_named_with_the_version_that_it_states(tmp_path, said, version):
    tool = tmp_path / "tool"
    tool.write_text(f"#!/bin/sh\necho '{said}'\n")
    tool.chmod(0o755)
    assert doctor._version([str(tool)]) == f"{tool} {version or 'of an unknown version'}"
    assert doctor._version(None) is None
