import json
import sys
from pathlib import Path

import pytest
import torch

from dbkernels.ops.backend import library
from dbkernels.ops.backend.register import registered

MANIFEST = library.Manifest("0" * 64, 13, (80, 90))
LOADED = library.Library(None, manifest=MANIFEST)
FOR_CPUS = library.Library(None, manifest=MANIFEST._replace(cuda=0, architectures=()))
LEFT_OUT = library.Library("It was left out: no compiler.")
BROKEN = library.Library("libdbkernels.so does not load: [x].", True, MANIFEST)
HERE = {"c++": "12.2", "gcc": "12.2"}  # compilers and what they say
STATED = {"c++": "c++ (Debian 12.2.0-14) 12.2.0", "nvcc": "release 13.0, V13.0.88", "gcc": ""}
VERSIONS = "C compiler        gcc of an unknown version\nC++ compiler      c++ 12.2.0\n"
NO_NVCC = "Nothing of it serves the GPU: no nvcc was found."
NO_KERNELS = {"found": FOR_CPUS, "gpu_reason": "no nvcc was found.", "tools": {**HERE, "nvcc": ""}}
BUILD = "setup.py build_ext --inplace\n"
NO_TRITON = "no op\nruns in Triton on a GPU"


@pytest.fixture
def machine(cli, monkeypatch, tmp_path):
    """What the doctor says of a library, its CUDA kernels, a GPU and the compilers of a machine."""

    def examined(found=LOADED, *, flags="", gpu_reason="none", kernels=(), tools=HERE):
        monkeypatch.setattr(library, "library", lambda: found)
        monkeypatch.setattr(library, "serves", lambda op, place: f"{op} {place.type}" in kernels)
        monkeypatch.setattr(library, "has_kernel", lambda op, kind: f"{op} {kind}" in kernels)
        monkeypatch.setattr(library, "cuda_reason", lambda device: gpu_reason)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu_reason != "none")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
        (places := tmp_path / "bin").mkdir()
        for name, said in tools.items():
            (places / name).write_text(f"#!/bin/sh\necho '{said}'\n")
            (places / name).chmod(0o755)
        for name, value in {"CC": "", "CXX": "", "CUDA_HOME": tmp_path, "PATH": places}.items():
            monkeypatch.setenv(name, str(value))
        return cli(f"doctor {flags}")

    return examined


def line(outcome, name):
    (found,) = [text for text in outcome.out.splitlines() if text.startswith(name)]
    return " ".join(found.removeprefix(name).split())


def test_names_what_is_here_and_what_runs_each_op(machine):
    kernels = {"gelu_fwd cpu", "gelu_bwd cpu", "swiglu_fwd cpu", "gelu_fwd cuda"}
    outcome = machine(kernels=kernels)
    assert outcome.code == 0 and max(map(len, outcome.out.splitlines())) <= 80
    assert line(outcome, "torch") == torch.__version__
    assert line(outcome, "NVIDIA GPU") == line(outcome, "nvcc") == "none"
    assert line(outcome, " gelu ") == "│ cpp │ cuda, backward triton"
    assert line(outcome, " swiglu ") == "│ cpp, backward torch │ triton"
    assert line(outcome, " add_noise ") == "│ torch │ triton"
    assert "if there were one" in outcome.out


@pytest.mark.parametrize(
    ("pretended", "code", "library", "said", "not_said"),
    [
        ({}, 0, "loaded, for CPUs and for GPUs of sm_80, sm_90", "", "To build it"),
        ({"tools": {"c++": ""}}, 0, "loaded, ", NO_TRITON, "To build it"),
        ({"found": LEFT_OUT}, 0, "It was left out: no compiler.", BUILD, NO_TRITON),
        ({"found": LEFT_OUT}, 0, "", "in plain torch on a CPU and in Triton on a GPU.", "install"),
        ({"found": LEFT_OUT, "tools": {}}, 0, "", "such as g++, and then run:", "broken"),
        ({"found": LEFT_OUT, "tools": {}}, 0, "", "in plain torch on a CPU.\n", "and in Triton on"),
        ({"tools": {}}, 0, "", "C compiler        none\nC++ compiler      none\nnvcc", "12.2"),
        ({"found": BROKEN}, 1, "broken: libdbkernels.so does not load: [x].", BUILD, "loaded"),
        ({"tools": STATED}, 0, "", VERSIONS, "Debian"),
        ({"tools": STATED}, 0, "", "/nvcc 13.0\n", "V13.0"),
        (NO_KERNELS, 0, "loaded, for CPUs and for no GPU", f"{NO_NVCC}\nTo build", "if there were"),
    ],
)
def test_says_what_is_missing_and_what_adds_it(machine, pretended, code, library, said, not_said):
    outcome = machine(**pretended)
    assert outcome.code == code
    assert line(outcome, "compiled library").startswith(library)
    assert said in outcome.out and not_said not in outcome.out


PIP = " -m pip install --no-build-isolation --no-deps --no-cache-dir --force-reinstall "


@pytest.mark.parametrize(
    ("changes", "command"),
    [
        ({"CSRC": Path("nowhere")}, f"{PIP}path/to/the/checkout"),
        ({"processor_serves": lambda: True}, f" {BUILD.strip()}"),
        # no command would help
        ({"processor_serves": lambda: False}, None),
    ],
)
def test_the_command_suits_the_installation(machine, monkeypatch, changes, command):
    monkeypatch.setitem(sys.modules, "ninja", None)
    for name, value in changes.items():
        monkeypatch.setattr(library, name, value)
    fix = json.loads(machine(LEFT_OUT, flags="--json").out)["library"]["fix"]
    install = " -m pip install ninja 'setuptools>=77' && "
    assert fix is None if command is None else install in fix and fix.endswith(command)


def test_a_gpu_that_is_served_needs_no_command(machine):
    report = json.loads(machine(gpu_reason=None, tools={**HERE, "nvcc": ""}, flags="--json").out)
    assert report["gpu"] == {"name": "H100", "sm": "90", "reason": None}
    assert report["library"]["fix"] is None


def test_json_is_one_object_with_every_op(cli):
    outcome = cli("doctor --json")
    report = json.loads(outcome.out)
    assert outcome.out.count("\n") == 1
    assert report.keys() >= {"python", "torch", "triton", "gpu", "compiler", "nvcc", "library"}
    assert report["ops"].keys() == set(registered())
    assert outcome.code == int(report["library"]["broken"])
