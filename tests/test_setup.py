import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import pytest

from dbkernels.ops.backend import library, toolchain

ROOT = Path(__file__).parents[1]
LIBRARY, NOTE = "libdbkernels.so", "libdbkernels.txt"
OPS, TOOLCHAIN = Path("dbkernels", "ops"), Path("backend", "toolchain.py")
IN_PLACE = ("build_ext", "--inplace")
# what a build sees that pip isolates: its own requirements, and not the environment's packages
ISOLATED = """if True:
    import runpy, site, sys
    sys.path = [path for path in sys.path if not path.endswith("-packages")] + ["required"]
    {more}
    sys.argv = ["setup.py", *sys.argv[1:]]
    runpy.run_path("setup.py")
"""
WITHOUT_TORCH = ISOLATED.format(
    more="site.getsitepackages = list; site.getusersitepackages = lambda: '/nonexistent'"
)
MACHINE = sysconfig.get_platform().replace("-", "_")


@pytest.fixture
def checkout(tmp_path):
    """A checkout whose sources are two functions, which compile in no time."""
    checkout = tmp_path / "with a space"
    (checkout / OPS).mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    (checkout / "tests").mkdir()
    (checkout / "tests" / "test_it.py").touch()
    (checkout / OPS / "backend").mkdir()
    for name in ("__init__.py", "py.typed", "ops/__init__.py", "ops/backend/__init__.py"):
        (checkout / "dbkernels" / name).touch()
    shutil.copy(ROOT / OPS / TOOLCHAIN, checkout / OPS / TOOLCHAIN)
    csrc = checkout / "csrc"
    csrc.mkdir()
    (csrc / "answer.h").write_text("constexpr int answer = 41;\n")
    source = '#include "answer.h"\nextern "C" int ask() { return answer; }\n'
    (csrc / "library.cpp").write_text(source)
    (csrc / "maths.cpp").write_text(source)
    return checkout


@pytest.fixture
def build(checkout):
    """Runs setup.py in the checkout, without nvcc unless CUDA_HOME says where one is."""

    def run(*arguments, script=("setup.py",), folder=checkout, **environment):
        usual = {"CUDA_HOME": str(checkout / "none"), "LC_ALL": "C", "TORCH_CUDA_ARCH_LIST": ""}
        environment = os.environ | usual | environment
        command = [sys.executable, *script, *arguments]
        return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)

    return run


@pytest.fixture
def required(checkout):
    """A folder with what pyproject.toml asks for to build, and with nothing else."""
    (checkout / "required").mkdir()
    for name in ("setuptools", "ninja"):
        place = Path(importlib.util.find_spec(name).origin).parents[1]
        for path in (place / name, *place.glob(f"{name}-*.dist-info")):
            (checkout / "required" / path.name).symlink_to(path)


@pytest.fixture
def git(checkout):
    """Runs git in the checkout, which has one commit of all its files."""

    def run(line):
        options = ["-c", "user.name=A", "-c", "user.email=a@b.c"]
        command = ["git", "-C", checkout, *options, *line.split()]
        subprocess.run(command, check=True, capture_output=True)

    (checkout / ".gitignore").write_text("__pycache__\nbuild\n*.egg-info\nwheels\nout\n")
    for line in ("init", "add .", "commit -m one"):
        run(line)
    return run


@pytest.fixture
def fake_nvcc(checkout):
    """An nvcc that knows two architectures of ours and compiles nothing."""
    path = checkout / "cuda" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(
        "#!/bin/sh\n"
        "case $1 in\n"
        "--version) echo 'Cuda compilation tools, release 12.4, V12.4.1';;\n"
        "--list-gpu-code) echo sm_75 sm_80 sm_90 sm_90a;;\n"
        "*) echo 'nvcc: error: unsupported host'; exit 1;;\n"
        "esac\n"
    )
    path.chmod(0o755)
    return str(checkout / "cuda")


def note_of(folder):
    return (folder / OPS / NOTE).read_text()


def test_builds_a_library_that_knows_its_sources(checkout, build):
    done = build(*IN_PLACE)
    assert done.returncode == 0, done.stdout + done.stderr
    manifest = library.read_manifest(checkout / OPS / LIBRARY)
    assert manifest == library.Manifest(toolchain.digest(checkout / "csrc"), 0, ())
    assert len(list((checkout / OPS).glob("_maths*.so"))) == 1
    reason, cost = note_of(checkout).splitlines()
    assert reason == "CUDA kernels were left out: no nvcc was found that works."
    assert cost == "An NVIDIA GPU runs the Triton kernels."
    assert f"{reason} {cost}\n" in done.stderr


def test_builds_again_what_a_header_changes_or_a_source_adds_and_nothing_otherwise(checkout, build):
    build(*IN_PLACE)
    assert "no work to do" in build(*IN_PLACE).stdout
    (checkout / "csrc" / "answer.h").write_text("constexpr int answer = 42;\n")
    assert "library.cpp" in build(*IN_PLACE).stdout
    # a new source is built without being named anywhere
    (checkout / "csrc" / "other.cpp").write_text("int other() { return 1; }\n")
    assert "other.cpp" in build(*IN_PLACE).stdout


@pytest.mark.parametrize(
    ("environment", "script", "reason"),
    [
        ({"CXX": "/nonexistent"}, ("setup.py",), "no C++ compiler, got CXX='/nonexistent'."),
        ({}, ("-c", WITHOUT_TORCH), "torch was not there when the package was built."),
    ],
)
def test_installs_without_what_is_missing(checkout, build, required, environment, script, reason):
    done = build("build", "--build-lib", "out", script=script, **environment)
    assert done.returncode == 0, done.stderr
    assert (checkout / "out" / OPS / TOOLCHAIN).exists()
    assert not list((checkout / "out").rglob("*.so"))
    cost = "Every op still runs, on a CPU in plain torch and on an NVIDIA GPU in Triton, "
    cost, left_out = f"{cost}which needs a C compiler there.", "The compiled library was left out:"
    assert note_of(checkout / "out").splitlines() == [f"{left_out} {reason}", cost]
    assert f"{left_out} {reason} {cost}\n" in done.stderr


def test_the_package_works_without_its_library_and_the_doctor_says_why(checkout, build):
    built = shutil.ignore_patterns("*.so", NOTE, "__pycache__")
    shutil.copytree(ROOT / "dbkernels", checkout / "dbkernels", ignore=built, dirs_exist_ok=True)
    assert build("build", "--build-lib", "out", CXX="/nonexistent").returncode == 0
    command = [sys.executable, "-m", "dbkernels", "doctor", "--json"]
    done = subprocess.run(command, cwd=checkout / "out", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = json.loads(done.stdout)["library"]
    assert library["reason"] == note_of(checkout / "out").splitlines()[0]
    assert not library["loaded"] and not library["broken"]


def test_a_build_that_was_asked_for_by_name_fails_where_it_cannot_be(checkout, build):
    assert build(*IN_PLACE, CXX="/nonexistent").returncode == 1
    assert "no C++ compiler" in note_of(checkout)


def test_an_error_of_the_code_is_shown_and_the_package_still_installs(checkout, build):
    (checkout / "csrc" / "library.cpp").write_text("int broken() { return nothing; }\n")
    done = build("build", "--build-lib", "out")
    assert done.returncode == 0
    assert "int broken()" in done.stdout  # the compiler's own output
    assert "csrc/library.cpp:1" in note_of(checkout / "out")
    assert "'nothing' was not declared" in note_of(checkout / "out")


def test_a_library_of_an_earlier_build_does_not_outlive_a_failure(checkout, build):
    build(*IN_PLACE)
    (checkout / "csrc" / "library.cpp").write_text("error\n")
    assert build(*IN_PLACE).returncode == 1
    assert not list((checkout / OPS).glob("*.so"))


def test_an_nvcc_that_says_nothing_is_none(checkout, build, fake_nvcc):
    Path(fake_nvcc, "bin", "nvcc").write_text("#!/bin/sh\n")
    assert build(*IN_PLACE, CUDA_HOME=fake_nvcc).returncode == 0
    assert "no nvcc was found that works" in note_of(checkout)


@pytest.mark.parametrize(
    ("asked", "built"),
    [("", {"80", "90"}), ("9.0", {"90"}), ("7.5;9.0+PTX", {"90"}), ("9.0a 12.0", {"90"}),
     ("7.5", set())],
)  # fmt: skip
def test_nvcc_is_asked_for_the_architectures_that_it_knows_and_its_failure_costs_no_code_for_cpus(
    checkout, build, fake_nvcc, asked, built
):
    (checkout / "csrc" / "op.cu").write_text("\n")
    done = build(*IN_PLACE, CUDA_HOME=fake_nvcc, TORCH_CUDA_ARCH_LIST=asked)
    assert set(re.findall(r"code=sm_(\d+)", done.stdout)) == built
    assert done.returncode == 0 and library.read_manifest(checkout / OPS / LIBRARY).cuda == 0
    failed = "the compiler failed with: nvcc: error: unsupported host"
    reason = failed if built else "no nvcc was found that works for"
    assert note_of(checkout).startswith(f"CUDA kernels were left out: {reason}")


def wheel_of(checkout, build, *, script=("setup.py",), **environment):
    """Builds a wheel; its tag, its files, and the tag that it states itself."""
    done = build("bdist_wheel", "--dist-dir", "wheels", script=script, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (checkout / "wheels").iterdir()
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        (about,) = (name for name in names if name.endswith(".dist-info/WHEEL"))
        (stated,) = re.findall(r"^Tag: (.*)$", wheel.read(about).decode(), re.MULTILINE)
    return path.stem.split("-", 2)[2], names, stated


# pip hides torch from a build, which finds it where pip installs to
@pytest.mark.parametrize("script", [("setup.py",), ("-c", ISOLATED.format(more=""))])
def test_a_wheel_has_the_library_for_any_python_and_nothing_for_tests(
    checkout, build, required, script
):
    assert build(*IN_PLACE).returncode == 0
    assert list((checkout / OPS).glob("_maths*.so"))
    tag, names, stated = wheel_of(checkout, build, script=script)
    assert tag == stated == f"py3-none-{MACHINE}"
    assert {f"{OPS}/{LIBRARY}", f"{OPS}/{NOTE}", "dbkernels/py.typed"} <= {*names}
    assert not [name for name in names if "maths" in name or "test" in name]


def test_a_wheel_without_the_library_is_for_any_machine(checkout, build):
    tag, names, stated = wheel_of(checkout, build, CXX="/nonexistent")
    assert tag == stated == "py3-none-any"
    assert f"{OPS}/{NOTE}" in names and f"{OPS}/{LIBRARY}" not in names


def test_an_archive_of_the_sources_builds_the_same_version_and_has_no_tests(checkout, build, git):
    git("tag v1.4.0")
    done = build("sdist", "--formats=tar", "--dist-dir", "out")
    assert done.returncode == 0, done.stderr
    with tarfile.open(checkout / "out" / "dbkernels-1.4.0.tar") as archive:
        archive.extractall(checkout, filter="data")
    unpacked = checkout / "dbkernels-1.4.0"
    for name in (
        "setup.py",
        "csrc/library.cpp",
        "csrc/maths.cpp",
        "csrc/answer.h",
        OPS / TOOLCHAIN,
    ):
        assert (unpacked / name).exists()
    assert not (unpacked / "tests").exists()
    # also below a checkout of another version
    git("commit --allow-empty -m more")
    wheel_of(unpacked, partial(build, folder=unpacked))
    (wheel,) = (unpacked / "wheels").iterdir()
    assert wheel.name == f"dbkernels-1.4.0-py3-none-{MACHINE}.whl"


@pytest.mark.parametrize(
    ("steps", "version"),
    [
        ([], r"0\.1\.0\.dev1\+g[0-9a-f]{7,}"),
        (["tag v1.4.0"], r"1\.4\.0"),
        (["tag v1.4.0", "tag other"], r"1\.4\.0"),
        (["tag v1.4.9", "commit --allow-empty -m two"], r"1\.4\.10\.dev1\+g[0-9a-f]{7,}"),
        (["tag v2.0.0rc1", "commit --allow-empty -m two"], r"2\.0\.0rc2\.dev1\+g[0-9a-f]{7,}"),
        (["tag v1.4.0", "rm csrc/answer.h"], r"1\.4\.1\.dev0\+g[0-9a-f]{7,}\.dirty"),
        (["rm csrc/answer.h"], r"0\.1\.0\.dev1\+g[0-9a-f]{7,}\.dirty"),
    ],
)
def test_the_version_is_that_of_gits_tag_or_on_the_way_to_the_next(build, git, steps, version):
    for step in steps:
        git(step)
    assert re.fullmatch(version, build("--version").stdout.strip())


def test_without_git_no_version_is_made_up(checkout, build, git):
    # another project's checkout above it says nothing of ours
    git("tag v1.4.0")
    inner = checkout / "inner"
    shutil.copytree(checkout, inner, ignore=shutil.ignore_patterns(".git", "inner"))
    assert build("--version", folder=inner).stdout.strip() == "0+unknown"
    assert build("--version", PATH="/nonexistent").stdout.strip() == "0+unknown"


def test_code_that_fails_here_is_not_passed_over():
    """Without a library the tests of csrc are not collected, so a failure must show by itself."""
    found = library.library()
    assert not found.broken, found.reason
    assert "the compiler failed" not in (found.reason or "")
