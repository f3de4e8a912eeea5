import os
import platform
from contextlib import nullcontext
from itertools import product

import pytest
import torch

from dbkernels import ops
from dbkernels.ops.backend import library, toolchain
from dbkernels.ops.backend.register import use_implementation

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIGEST = "0" * 64


@pytest.fixture(autouse=True)
def anew():
    """Each test asks anew, and the next one finds what this machine really has."""
    cached = (library.library, library.cuda_reason, library.serves, library.warn_where_missing)
    [function.cache_clear() for function in cached]
    yield
    [function.cache_clear() for function in cached]


@pytest.fixture
def loads(monkeypatch):
    """Paths that were loaded; nothing really is."""
    paths = []
    monkeypatch.setattr(torch.ops, "load_library", paths.append)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    return paths


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Makes a package with a library of one manifest, beside sources or alone."""
    monkeypatch.setattr(library, "PATH", tmp_path / "libdbkernels.so")
    monkeypatch.setattr(library, "CSRC", tmp_path / "csrc")

    def make(manifest=None, *, sources=False, note=None, empty=False):
        if sources:
            (tmp_path / "csrc").mkdir()
            (tmp_path / "csrc" / "library.cpp").write_text("// ops\n")
        if manifest is not None:
            library.PATH.write_bytes(b"\x7fELF\0" + manifest.encode() + b"\0rest")
        if empty:
            library.PATH.touch()
        if note is not None:
            library.PATH.with_suffix(".txt").write_text(note)

    return make


@pytest.fixture
def gpu(monkeypatch):
    """Pretends to a GPU of a compute capability, and to a driver."""

    def pretend(capability=(9, 0), driver=13000):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)

    return pretend


OURS = f"dbkernels csrc={DIGEST}"
NOT_OURS = "libdbkernels.so is not a library of dbkernels."


def test_a_library_of_the_sources_beside_it_is_loaded_once(place, loads):
    place(sources=True)
    digest = toolchain.digest(library.CSRC)
    place(f"dbkernels csrc={digest};")
    for _ in range(2):
        assert library.library() == (None, False, library.Manifest(digest, 0, ()))
    assert loads == [library.PATH]


def test_a_library_without_sources_beside_it_is_loaded(place, loads):
    place(f"{OURS} cuda=13.0 sm=80,120;")
    assert library.library().manifest == library.Manifest(DIGEST, 13, (80, 120))
    assert loads == [library.PATH]


OTHER_SOURCES = "libdbkernels.so was built from other sources than csrc."
NOTE = "It was left out: no compiler.\nEvery op still runs.\n"
REFUSED = [
    ({"manifest": f"{OURS};", "sources": True}, OTHER_SOURCES, True),
    ({"manifest": ""}, NOT_OURS, True),
    ({"manifest": "dbkernels csrc=12;"}, NOT_OURS, True),
    ({"empty": True}, NOT_OURS, True),
    ({"note": NOTE}, "It was left out: no compiler.", False),
    ({}, "libdbkernels.so was never built.", False),
]


@pytest.mark.parametrize(("placed", "reason", "broken"), REFUSED)
def test_what_does_not_serve_is_not_loaded_and_says_why(place, loads, placed, reason, broken):
    place(**placed)
    assert library.library()[:2] == (reason, broken) and not loads
    assert not any(library.serves("gelu_fwd", device) for device in (CPU, GPU))


def test_a_library_that_does_not_load_is_broken(place, loads, monkeypatch):
    def fail(path):
        raise OSError("undefined symbol: x")

    place(f"{OURS};")
    monkeypatch.setattr(torch.ops, "load_library", fail)
    reason, broken, _ = library.library()
    assert reason == "libdbkernels.so does not load: undefined symbol: x." and broken


@pytest.mark.parametrize(("machine", "loaded"), [("x86_64", False), ("aarch64", True)])
def test_an_x86_processor_needs_avx2(place, loads, monkeypatch, machine, loaded):
    place(f"{OURS};")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    reason, broken, _ = library.library()
    assert reason == (None if loaded else "This processor has no AVX2.") and not broken
    assert bool(loads) is loaded


@pytest.mark.parametrize(
    ("placed", "avx2", "asked", "warned"),
    [
        ({"note": NOTE}, True, None, ["It was left out: no compiler. On a CPU dbkernels runs in"]),
        ({"manifest": ""}, True, None, [f"{NOT_OURS} On a CPU dbkernels runs in"]),
        ({"manifest": f"{OURS};"}, True, None, []),
        # whoever asked for it knows
        ({"note": NOTE}, True, "torch", []),
        # nothing would help
        ({"note": NOTE}, False, None, []),
    ],
)
def test_the_first_op_that_lacks_the_library_says_how_to_add_it(
    place, loads, monkeypatch, recwarn, placed, avx2, asked, warned
):
    place(**placed)
    monkeypatch.setattr(library, "processor_serves", lambda: avx2)
    with use_implementation(asked) if asked else nullcontext():
        for _ in range(2):
            ops.gelu(torch.ones(1, 2, 3), torch.ones(3))
    messages = [str(warning.message) for warning in recwarn]
    assert len(messages) == len(warned)
    assert all(map(str.startswith, messages, warned))
    assert all(message.endswith(f"run: {library.build_command()}") for message in messages)


@pytest.mark.parametrize(
    ("manifest", "capability", "driver", "reason"),
    [
        (" cuda=13.0 sm=80,90", (9, 0), 13010, None),
        (" cuda=12.8 sm=80,90", (8, 9), 13000, None),
        (" cuda=13.0 sm=80,90", (7, 5), 13000, "was built for sm_80, sm_90, got a GPU of sm_75."),
        (" cuda=13.0 sm=86,90", (8, 0), 13000, "was built for sm_86, sm_90, got a GPU of sm_80."),
        (" cuda=13.0 sm=90", (12, 0), 13000, "was built for sm_90, got a GPU of sm_120."),
        (" cuda=13.0 sm=90", (9, 0), 12090, "needs a driver of CUDA 13, got one of CUDA 12."),
        ("", (9, 0), 13000, "was built without nvcc."),
    ],
)
def test_a_gpu_is_served_by_what_was_built_for_it(
    place, loads, gpu, manifest, capability, driver, reason
):
    place(f"{OURS}{manifest};")
    gpu(capability, driver)
    expected = reason if reason is None else f"libdbkernels.so {reason}"
    assert library.cuda_reason(GPU) == expected


def test_without_cuda_or_a_gpu_it_says_so(place, loads, gpu, monkeypatch):
    gpu()
    place(f"{OURS};", note="CUDA kernels were left out: no nvcc was found.\n")
    assert library.cuda_reason(GPU) == "CUDA kernels were left out: no nvcc was found."
    library.cuda_reason.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.cuda_reason(GPU) == "There is no NVIDIA GPU."


# its sources, and the compilers of this machine


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a file that can be run, in a folder that alone is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CC", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def make(name):
        (folder / name).touch(mode=0o755)
        return str(folder / name)

    return make


def test_the_digest_changes_with_every_source_its_name_and_where_it_ends(tmp_path):
    csrc, digests = tmp_path, []
    for text, name in product(("// one\n", "// other\n"), ("a.cpp", "a.cu", "a.cuh", "a.h")):
        (csrc / name).write_text(text)
        digests.append(toolchain.digest(csrc))
    (csrc / "a.h").rename(csrc / "b.h")
    digests.append(toolchain.digest(csrc))
    (csrc / "b.h").unlink()
    (csrc / "a.cuh").write_text("// other\nb.h// other\n")
    digests.append(toolchain.digest(csrc))
    assert len(set(digests)) == len(digests)
    # and with nothing else
    (csrc / "a.o").write_text("object")
    assert toolchain.digest(csrc) == digests[-1]


@pytest.mark.parametrize(
    ("find", "variable", "there", "given", "found"),
    [
        (toolchain.compiler, "CXX", [], None, None),
        (toolchain.compiler, "CXX", ["clang++"], None, ["clang++"]),
        (toolchain.compiler, "CXX", ["clang++", "c++"], None, ["c++"]),
        # with its flags, and no other is taken
        (toolchain.compiler, "CXX", ["c++"], "mine -m64", None),
        (toolchain.compiler, "CXX", ["c++", "mine"], "mine -m64", ["mine", "-m64"]),
        # that of C is the one that triton takes
        (toolchain.c_compiler, "CC", [], None, None),
        (toolchain.c_compiler, "CC", ["clang"], None, ["clang"]),
        (toolchain.c_compiler, "CC", ["clang", "gcc"], None, ["gcc"]),
        (toolchain.c_compiler, "CC", ["gcc"], "my-cc", None),
        (toolchain.c_compiler, "CC", ["gcc", "my-cc"], "my-cc", ["my-cc"]),
    ],
)
def test_the_compiler_is_the_one_that_is_named_or_the_first_on_path(
    command, monkeypatch, find, variable, there, given, found
):
    for name in there:
        command(name)
    if given:
        monkeypatch.setenv(variable, given)
    assert find() == found


def test_nvcc_of_cuda_home_counts_and_no_other(command, monkeypatch, tmp_path):
    on_path = command("nvcc")
    assert toolchain.nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.nvcc() is None
    os.renames(on_path, of_home := tmp_path / "cuda" / "bin" / "nvcc")
    assert toolchain.nvcc() == str(of_home)
