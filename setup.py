"""Builds csrc; where that cannot be, the package installs in plain Python and says what it lacks.

One run of ninja makes `dbkernels/ops/libdbkernels.so`, which any Python and any torch of the stable
ABI can load. In a checkout that is to be worked in, it also makes `dbkernels/ops/_maths`, by which
the tests see the arithmetic of one element. CXX, CUDA_HOME and MAX_JOBS are honoured;
TORCH_CUDA_ARCH_LIST, such as "9.0", leaves out the code of all other GPUs.
"""

import fcntl
import io
import os
import platform
import re
import runpy
import shlex
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC, BUILD, PACKAGE = ROOT / "csrc", ROOT / "build" / "csrc", Path("dbkernels", "ops")
LIBRARY, NOTE = "libdbkernels.so", "libdbkernels.txt"
MATHS = f"_maths{sysconfig.get_config_var('EXT_SUFFIX')}"
ARCHITECTURES = (80, 90, 100, 120)  # 10 times the compute capability
# torch 2.10 is the first whose stable ABI is asked for
FLAGS = "-std=c++17 -O3 -DTORCH_TARGET_VERSION=0x020a000000000000"
CUDA_FLAGS = "-Xcompiler -fPIC,-fvisibility=hidden -DUSE_CUDA"
WRITE_DEPENDS = " -MMD -MF $out.d"
READ_DEPENDS = {"depfile": "$out.d", "deps": "gcc"}
# NaN and infinity survive these, and loops become vectors
HOST_FLAGS = "-fPIC -fvisibility=hidden -fopenmp-simd -fno-math-errno -fno-trapping-math -Wall"
# a symbol that torch lacks is found when linking and not when the library is loaded
LINKER_WORDS = ("-z", "defs", "--exclude-libs", "ALL", "--no-as-needed")
# libtorch itself for libtorch_cuda, which it brings where there is one
LIBS = ("-ltorch", "-ltorch_cpu", "-lc10")
X86_FLAGS = "-march=x86-64-v3"  # AVX2 and FMA, which backend/library.py asks the processor for
TOOLS = runpy.run_path(str(ROOT / PACKAGE / "backend" / "toolchain.py"))
FIRST_RELEASE = "0.1.0"  # that commits without a tag before them lead to

WITHOUT_LIBRARY = (
    "Every op still runs, on a CPU in plain torch and on an NVIDIA GPU in Triton, which needs a C "
    "compiler there."
)
WITHOUT_CUDA = "An NVIDIA GPU runs the Triton kernels."


class NotBuiltError(Exception):
    """Why the library is not there, in one sentence."""


@dataclass(frozen=True)
class Cuda:
    """A CUDA compiler, and those of our architectures that it knows."""

    nvcc: str
    version: str
    architectures: list[int]


class BuildCsrc(build_ext):
    """Builds what is compiled, straight to where it belongs."""

    def run(self) -> None:
        target = ROOT / PACKAGE if self.inplace else Path(self.build_lib, PACKAGE)
        target.mkdir(parents=True, exist_ok=True)
        for name in (LIBRARY, MATHS):  # one of an earlier build would hide that this one failed
            (target / name).unlink(missing_ok=True)
        # only tests need _maths, which would tie a wheel to one Python
        names = [LIBRARY, MATHS] if self.inplace and python_headers() else [LIBRARY]
        note, built = [], True
        try:
            note = build(target, names)
        except (NotBuiltError, OSError) as error:
            note, built = [f"The compiled library was left out: {error}", WITHOUT_LIBRARY], False
        (target / NOTE).write_text("".join(f"{line}\n" for line in note))
        if note:
            print(*note, file=sys.stderr)
        # part of an installation it may be missing, but not where it was asked for by name
        if not built and "build_ext" in self.distribution.commands:
            raise SystemExit(1)

    def get_output_mapping(self) -> dict[str, str]:
        names = (LIBRARY, MATHS, NOTE) if self.inplace else ()
        there = [PACKAGE / name for name in names if (ROOT / PACKAGE / name).exists()]
        return {str(Path(self.build_lib, path)): str(path) for path in there}

    def get_outputs(self) -> list[str]:
        if self.inplace:
            return list(self.get_output_mapping())
        paths = [Path(self.build_lib, PACKAGE, name) for name in (LIBRARY, NOTE)]
        return [str(path) for path in paths if path.exists()]


class Wheel(bdist_wheel):
    """A wheel for any Python 3, and without the library for any machine too."""

    def get_tag(self) -> tuple[str, str, str]:
        *_, machine = super().get_tag()
        library = Path(self.get_finalized_command("build").build_lib, PACKAGE, LIBRARY)
        return "py3", "none", machine if library.exists() else "any"


def build(target: Path, names: list[str]) -> list[str]:
    """Build files into a directory; returns why something was left out and what that costs."""
    torch, compiler = torch_folder(), TOOLS["compiler"]()
    if torch is None:
        raise NotBuiltError("torch was not there when the package was built.")
    if find_spec("ninja") is None:
        raise NotBuiltError("the package ninja is not here.")
    if compiler is None:
        raise NotBuiltError(f"no C++ compiler, got CXX={os.environ.get('CXX', '')!r}.")
    with locked(BUILD):
        cuda = find_cuda()
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
        works = f"works for TORCH_CUDA_ARCH_LIST={asked!r}" if asked else "works"
        none = f"CUDA kernels were left out: no nvcc was found that {works}."
        note = [] if cuda else [none, WITHOUT_CUDA]
        try:
            run_ninja(compiler, torch, cuda, names)
        except NotBuiltError as error:
            if cuda is None:
                raise
            note = [f"CUDA kernels were left out: {error}", WITHOUT_CUDA]
            run_ninja(compiler, torch, None, names)
        for name in names:
            # never written in place: a process may have loaded what is there
            fresh = target / f".{name}"
            fresh.write_bytes((BUILD / name).read_bytes())
            fresh.replace(target / name)
    return note


def torch_folder() -> Path | None:
    """Where torch is: in the environment of the build, else in the one that pip installs into.

    Pip hides the latter from a build, so that a package depends on nothing there. The library does
    not: headers of the stable ABI are as good as those of any other torch, of which a build of its
    own would download gigabytes.
    """
    of_python = [*site.getsitepackages(), site.getusersitepackages()]
    torch = PathFinder.find_spec("torch", [*sys.path, *of_python])
    return Path(torch.origin).parent if torch and torch.origin else None


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Ninja does not notice another that works in the same directory."""
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def find_cuda() -> Cuda | None:
    nvcc = TOOLS["nvcc"]()
    if nvcc is None:
        return None
    codes, about = (
        subprocess.run([nvcc, flag], capture_output=True, text=True).stdout
        for flag in ("--list-gpu-code", "--version")
    )
    known = {int(code) for code in re.findall(r"sm_(\d+)\b", codes)}
    architectures = [arch for arch in wanted() if arch in known]
    version = re.search(r"release (\d+\.\d+)", about)
    return Cuda(nvcc, version[1], architectures) if version and architectures else None


def wanted() -> list[int]:
    """Those of our architectures that TORCH_CUDA_ARCH_LIST names; all where it names nothing."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not asked:
        return list(ARCHITECTURES)
    named = {10 * int(major) + int(minor) for major, minor in re.findall(r"(\d+)\.(\d)", asked)}
    return [arch for arch in ARCHITECTURES if arch in named]


def run_ninja(compiler: list[str], torch: Path, cuda: Cuda | None, names: list[str]) -> None:
    """Bring files in BUILD up to date."""
    import ninja

    cuda_words = f" cuda={cuda.version} sm={','.join(map(str, cuda.architectures))}" if cuda else ""
    manifest = f"dbkernels csrc={TOOLS['digest'](CSRC)}{cuda_words};"
    write_if_changed(
        BUILD / "manifest.cpp",
        f'extern "C" __attribute__((used)) const char dbkernels_manifest[] = "{manifest}";\n',
    )
    write_if_changed(BUILD / "build.ninja", ninja_file(compiler, torch, cuda))
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    command = [Path(ninja.BIN_DIR, "ninja"), "-C", BUILD, *jobs, *names]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(done.stdout, flush=True)
    if done.returncode:
        first = re.search(r"^.*\berror\b.*$", done.stdout, re.MULTILINE)
        raise NotBuiltError(f"the compiler failed with: {first[0] if first else 'no error line'}.")


def ninja_file(compiler: list[str], torch: Path, cuda: Cuda | None) -> str:
    """How every object and both files are made; ninja itself follows the headers."""
    from ninja.ninja_syntax import Writer

    text = io.StringIO()
    ninja, cxx = Writer(text, width=10**6), shlex.join(compiler)
    includes = shlex.join([f"-I{CSRC}", "-isystem", f"{torch}/include"])
    x86 = X86_FLAGS if platform.machine() == "x86_64" else ""
    compile = f"{cxx} -c $in -o $out {FLAGS} {HOST_FLAGS} {x86} {includes} $more"
    ninja.rule("cpp", compile + WRITE_DEPENDS, **READ_DEPENDS)
    ninja.rule("link", f"{cxx} -shared -o $out $in $more")

    objects = [_object(ninja, "cpp", path) for path in (BUILD / "manifest.cpp", *library("*.cpp"))]
    if cuda:
        cuda_rules(ninja, compiler, cuda, includes)
        objects += [_object(ninja, "cu", path) for path in library("*.cu")]
    linker = [word for each in LINKER_WORDS for word in ("-Xlinker", each)]
    more = {"more": shlex.join([*linker, f"-L{torch}/lib", *LIBS])}
    ninja.build(LIBRARY, "link_cuda" if cuda else "link", objects, variables=more)
    if python_headers():
        more = {"more": shlex.join(["-isystem", python_headers()])}
        ninja.build("maths.o", "cpp", str(CSRC / "maths.cpp"), variables=more)
        ninja.build(MATHS, "link", "maths.o")
    return text.getvalue()


def cuda_rules(ninja, compiler: list[str], cuda: Cuda, includes: str) -> None:
    """How nvcc compiles, and how it links, for it knows where its runtime is."""
    nvcc = shlex.quote(cuda.nvcc)
    if len(compiler) == 1:  # that of the C++ files, where CXX names it alone
        nvcc += f" -ccbin {shlex.quote(compiler[0])}"
    code = " ".join(f"-gencode=arch=compute_{n},code=sm_{n}" for n in cuda.architectures)
    compile = f"{nvcc} -c $in -o $out {FLAGS} {CUDA_FLAGS} {code} {includes}"
    ninja.rule("cu", compile + WRITE_DEPENDS, **READ_DEPENDS)
    # linked statically, so that no version of the runtime is asked of a machine
    ninja.rule("link_cuda", f"{nvcc} -shared -cudart static -o $out $in $more")


def python_headers() -> str | None:
    """Where they are; only the tests' _maths needs them, so they may be missing."""
    include = Path(sysconfig.get_path("include"))
    return str(include) if (include / "Python.h").exists() else None


def library(pattern: str) -> list[Path]:
    return sorted(path for path in CSRC.glob(pattern) if path.stem != "maths")


def _object(ninja, rule: str, path: Path) -> str:
    (name,) = ninja.build(f"{path.name}.o", rule, str(path))
    return name


def write_if_changed(path: Path, text: str) -> None:
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def version() -> str:
    """That of the release whose tag git finds here, else of a step towards the next one."""
    if (info := ROOT / "PKG-INFO").exists():  # of an archive of the sources, which has no git
        return re.search(r"^Version: (\S+)$", info.read_text(), re.MULTILINE)[1]
    described = git("describe", "--tags", "--match=v[0-9]*", "--long", "--dirty=.dirty")
    if found := re.fullmatch(r"v(.+)-(\d+)-(g\w+)(\.dirty)?", described):
        tag, steps, commit, dirty = found.groups(default="")
        if steps == "0" and not dirty:
            return tag
        following = re.sub(r"\d+$", lambda last: str(int(last[0]) + 1), tag)
        return f"{following}.dev{steps}+{commit}{dirty}"
    commit = git("describe", "--always", "--exclude=*", "--dirty=.dirty")
    steps = git("rev-list", "--count", "HEAD")
    return f"{FIRST_RELEASE}.dev{steps}+g{commit}" if commit else "0+unknown"


def git(*words: str) -> str:
    """What git says of this checkout; nothing where it is none, or git has nothing to say."""
    if not (ROOT / ".git").exists():  # and those above are not ours
        return ""
    try:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


sources = [str(path.relative_to(ROOT)) for path in sorted(CSRC.iterdir())]
setup(
    version=version(),
    cmdclass={"bdist_wheel": Wheel, "build_ext": BuildCsrc},
    # setuptools only asks it what belongs to the source, and sees that the wheel is not for all
    ext_modules=[
        Extension(
            "dbkernels.ops._maths",
            [name for name in sources if name.endswith((".cpp", ".cu"))],
            depends=[name for name in sources if name.endswith((".h", ".cuh"))],
        )
    ],
)
