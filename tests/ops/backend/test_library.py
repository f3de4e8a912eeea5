import platform

import pytest
import torch

from dbkernels.ops.backend import library, toolchain

CPU, GPU = torch.device("cpu"), torch.device("cuda")
DIGEST = "0" * 64


@pytest.fixture(autouse=True)
def anew():
    """Each test asks anew, and the next one finds what this machine really has."""
    cached = (library.library, library.cuda_reason, library.serves)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


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

    def make(manifest=None, *, sources=False, note=None):
        if sources:
            (tmp_path / "csrc").mkdir()
            (tmp_path / "csrc" / "library.cpp").write_text("// ops\n")
        if manifest is not None:
            library.PATH.write_bytes(b"\x7fELF\0" + manifest.encode() + b"\0rest")
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


def test_a_library_of_the_sources_beside_it_is_loaded_once(place, loads):
    place(sources=True)
    digest = toolchain.digest(library.CSRC)
    place(f"dbkernels csrc={digest};")
    assert library.library() == (None, False, library.Manifest(digest, 0, ()))
    assert library.library().reason is None
    assert loads == [library.PATH]


def test_a_library_without_sources_beside_it_is_loaded(place, loads):
    place(f"dbkernels csrc={DIGEST} cuda=13.0 sm=80,120;")
    assert library.library().manifest == library.Manifest(DIGEST, 13, (80, 120))
    assert loads == [library.PATH]


def test_a_library_of_other_sources_is_refused_and_not_loaded(place, loads):
    place(f"dbkernels csrc={DIGEST};", sources=True)
    reason, broken, _ = library.library()
    assert reason == "libdbkernels.so was built from other sources than csrc."
    assert broken and not loads


@pytest.mark.parametrize("manifest", ["", "dbkernels csrc=12;"])
def test_a_file_that_is_no_library_of_ours_is_refused(place, loads, manifest):
    place(manifest)
    assert library.library() == ("libdbkernels.so is not a library of dbkernels.", True, None)
    assert not loads


def test_an_empty_file_is_no_library(place):
    place()
    library.PATH.touch()
    assert library.library().broken


def test_a_missing_library_is_explained_in_the_words_of_the_build(place):
    place(note="It was left out: no compiler.\nEvery op still runs.\n")
    assert library.library() == ("It was left out: no compiler.", False, None)


def test_a_library_that_was_never_built_is_said_to_be(place):
    place()
    assert library.library() == ("libdbkernels.so was never built.", False, None)


def test_a_library_that_does_not_load_is_broken(place, monkeypatch):
    def fail(path):
        raise OSError("undefined symbol: x")

    place(f"dbkernels csrc={DIGEST};")
    monkeypatch.setattr(torch.ops, "load_library", fail)
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: True)
    reason, broken, _ = library.library()
    assert reason == "libdbkernels.so does not load: undefined symbol: x." and broken


@pytest.mark.parametrize(("machine", "loaded"), [("x86_64", False), ("aarch64", True)])
def test_an_x86_processor_needs_avx2(place, loads, monkeypatch, machine, loaded):
    place(f"dbkernels csrc={DIGEST};")
    monkeypatch.setattr(torch.cpu, "_is_avx2_supported", lambda: False)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    reason, broken, _ = library.library()
    assert reason == (None if loaded else "This processor has no AVX2.") and not broken
    assert bool(loads) is loaded


def test_without_a_library_nothing_is_served(place):
    place()
    assert not library.serves("gelu_fwd", CPU) and not library.serves("gelu_fwd", GPU)


@pytest.mark.parametrize(
    ("manifest", "capability", "driver", "reason"),
    [
        ("cuda=13.0 sm=80,90", (9, 0), 13010, None),
        ("cuda=12.8 sm=80,90", (8, 9), 13000, None),
        ("cuda=13.0 sm=80,90", (7, 5), 13000, "was built for sm_80, sm_90, got a GPU of sm_75."),
        ("cuda=13.0 sm=86,90", (8, 0), 13000, "was built for sm_86, sm_90, got a GPU of sm_80."),
        ("cuda=13.0 sm=90", (12, 0), 13000, "was built for sm_90, got a GPU of sm_120."),
        ("cuda=13.0 sm=90", (9, 0), 12090, "needs a driver of CUDA 13, got one of CUDA 12."),
    ],
)
def test_a_gpu_is_served_by_what_was_built_for_it(
    place, loads, gpu, manifest, capability, driver, reason
):
    place(f"dbkernels csrc={DIGEST} {manifest};")
    gpu(capability, driver)
    expected = reason if reason is None else f"libdbkernels.so {reason}"
    assert library.cuda_reason(GPU) == expected


def test_a_library_without_cuda_says_so(place, loads, gpu):
    gpu()
    place(f"dbkernels csrc={DIGEST};")
    assert library.cuda_reason(GPU) == "libdbkernels.so was built without nvcc."


def test_a_library_without_cuda_says_what_the_build_said(place, loads, gpu):
    gpu()
    place(f"dbkernels csrc={DIGEST};", note="CUDA kernels were left out: no nvcc was found.\n")
    assert library.cuda_reason(GPU) == "CUDA kernels were left out: no nvcc was found."


def test_no_gpu_is_served_where_there_is_none(place, loads, monkeypatch):
    place(f"dbkernels csrc={DIGEST} cuda=13.0 sm=90;")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert library.cuda_reason(GPU) == "There is no NVIDIA GPU."
