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
    for name in ("CC", "CXX", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)

    def make(name):
        path = folder / name
        path.write_text("")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return str(path)

    return make


def test_the_digest_changes_with_every_source_its_name_and_where_it_ends(csrc):
    digests = [toolchain.digest(csrc)]
    for name in ("a.cpp", "a.cu", "a.cuh", "a.h"):
        (csrc / name).write_text("// other\n")
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
    os.makedirs(tmp_path / "cuda" / "bin")
    of_home = tmp_path / "cuda" / "bin" / "nvcc"
    os.rename(on_path, of_home)
    assert toolchain.nvcc() == str(of_home)
