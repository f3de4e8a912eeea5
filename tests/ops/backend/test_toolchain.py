import os
import stat

import pytest

from dbkernels.ops.backend import toolchain


@pytest.fixture
def csrc(tmp_path):
    for name in ("a.cpp", "a.cu", "a.cuh", "a.h"):
        (tmp_path / name).write_text(f"// {name}\n")
    return tmp_path


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Makes a file that can be run, in a folder that alone is on PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for name in ("CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def make(name):
        path = folder / name
        path.write_text("")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


@pytest.mark.parametrize("name", ["a.cpp", "a.cu", "a.cuh", "a.h"])
def test_the_digest_changes_with_every_source(csrc, name):
    before = toolchain.digest(csrc)
    (csrc / name).write_text("// other\n")
    assert toolchain.digest(csrc) != before


def test_the_digest_knows_names_and_where_each_file_ends(csrc):
    before = toolchain.digest(csrc)
    (csrc / "a.h").rename(csrc / "b.h")
    renamed = toolchain.digest(csrc)
    (csrc / "b.h").write_text("")
    (csrc / "a.cuh").write_text("// a.cuh\n// a.h\n")
    assert len({before, renamed, toolchain.digest(csrc)}) == 3


def test_the_digest_is_of_sources_alone(csrc):
    before = toolchain.digest(csrc)
    (csrc / "a.o").write_text("object")
    assert toolchain.digest(csrc) == before


def test_the_compiler_is_the_first_on_path(command):
    assert toolchain.compiler() is None
    command("clang++")
    assert toolchain.compiler() == ["clang++"]
    command("c++")
    assert toolchain.compiler() == ["c++"]


def test_cxx_names_the_compiler_with_its_flags_and_no_other_is_taken(command, monkeypatch):
    command("c++")
    monkeypatch.setenv("CXX", "mine -m64")
    assert toolchain.compiler() is None
    command("mine")
    assert toolchain.compiler() == ["mine", "-m64"]


def test_nvcc_of_cuda_home_counts_and_no_other(command, monkeypatch, tmp_path):
    on_path = command("nvcc")
    assert toolchain.nvcc() == on_path
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert toolchain.nvcc() is None
    os.makedirs(tmp_path / "cuda" / "bin")
    of_home = tmp_path / "cuda" / "bin" / "nvcc"
    os.rename(on_path, of_home)
    assert toolchain.nvcc() == str(of_home)


@pytest.mark.parametrize(
    ("given", "there", "found"),
    [
        (None, {"gcc", "clang"}, ["gcc"]),
        (None, {"clang"}, ["clang"]),
        (None, set(), None),
        ("my-cc", {"gcc", "my-cc"}, ["my-cc"]),
        ("my-cc", {"gcc"}, None),
    ],
)
def test_the_c_compiler_is_the_one_that_triton_takes(monkeypatch, given, there, found):
    monkeypatch.delenv("CC", raising=False)
    if given:
        monkeypatch.setenv("CC", given)
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: name if name in there else None)
    assert toolchain.c_compiler() == found
