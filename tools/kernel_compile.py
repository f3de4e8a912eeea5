"""What a compiler made of a kernel: of Triton's, which are compiled for a GPU that is not here, and
of every CUDA kernel of the compiled library, which is read from the library itself."""

import importlib
import inspect
import math
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from unittest import mock

import torch
import triton
from kernel_cases import LAUNCHERS, B, Case, Shapes, T
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend, GPUTarget
from triton.compiler import ASTSource

from dbkernels.ops.backend import library
from dbkernels.ops.backend.register import dry_run_on_gpu

Widths = dict[str, tuple[int, ...]]  # bytes of the memory instructions, by argument

PROCESSORS = {80: 108, 90: 132, 100: 148}  # of an A100, an H100 or H200, and a B200
WARP = 32  # threads
DEFAULT_WARPS = 4  # of a program whose launcher names none
ALIGNED = 16  # bytes
_USAGE = re.compile(
    r"REG:(?P<registers>\d+) STACK:(?P<stack_bytes>\d+) SHARED:(?P<shared_bytes>\d+) "
    r"LOCAL:(?P<local_bytes>\d+)"
)
_ARCH = re.compile(r"^arch = sm_(\d+)")
_FUNCTION = re.compile(r"^ Function (\w+):")
_NAMESPACES = re.compile(r"(?:\w+|\(anonymous namespace\))::")
_LOAD_PARAM = re.compile(r"ld\.param\.[bu]64\s+(%rd\d+), \[\w+_param_(\d+)\]")
_ACCESS = re.compile(r"\b(ld|st)\.global[\w.:]*?((?:\.v[248])?)\.[busf](\d+)\s[^;\[]*\[ ?(%rd\d+)")
_REGISTER = re.compile(r"%rd\d+")


@dataclass(frozen=True)
class Launch:
    """What a launcher gave to its kernel."""

    arguments: dict[str, object]  # by name
    programs: int
    num_warps: int
    registers: int | None  # of a thread, where the launcher limits them


def record(case: Case, shapes: Shapes, arch: int) -> tuple[object, Launch]:
    """The kernel of a case, and its launch by its launcher on tensors without data."""
    op = importlib.import_module(f"dbkernels.ops.{case.module or case.op}")
    launcher, kernel_name = LAUNCHERS[case.direction]
    recorders = {}
    # launchers share work among the processors of a device; tensors without data have none
    with ExitStack() as stack, dry_run_on_gpu(PROCESSORS[arch]):
        for module in [m for name, m in sys.modules.items() if name.startswith("dbkernels.ops.")]:
            for name in {name for _, name in LAUNCHERS.values()} & vars(module).keys():
                recorder = recorders.setdefault(getattr(module, name), mock.MagicMock())
                stack.enter_context(mock.patch.object(module, name, recorder))
        getattr(op, launcher)(*case.first, *case.arguments(shapes))
    named = {k: of.__getitem__ for k, of in recorders.items() if k.__name__ == kernel_name}
    ((kernel, seen),) = [(k, launch) for k, launch in named.items() if launch.called]
    (grid,), (args, options) = seen.call_args.args, seen.return_value.call_args
    warps, registers = options.pop("num_warps", DEFAULT_WARPS), options.pop("maxnreg", None)
    bound = inspect.signature(kernel.fn).bind(*args, **options)
    return kernel, Launch(dict(bound.arguments), math.prod(grid), warps, registers)


def compile_launch(kernel, launch: Launch, arch: int) -> tuple[dict[str, int], Widths, Widths]:
    """Compile as a launch on a GPU of this architecture would.

    Returns:
        What the kernel uses, as `usage` has it, and the widths of its loads and of its stores.
    """
    signature, constants, attributes = {}, {}, {}
    for index, (name, value) in enumerate(launch.arguments.items()):
        parameter = kernel.params[index]
        kind, key = "constexpr", None
        if not parameter.is_constexpr:
            # as Triton's launches do, which compile in an absent tensor and the integer 1
            about = (False, not parameter.do_not_specialize, True)
            kind, key = native_specialize_impl(BaseBackend, value, *about)
        signature[name] = kind
        if kind == "constexpr":
            constants[name] = value
        elif key:
            attributes[(index,)] = BaseBackend.parse_attr(key)
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    # said because Triton's default is about to change, which its launches will follow
    options = {"num_warps": launch.num_warps, "enable_fp_fusion": True}
    options |= {"maxnreg": launch.registers} if launch.registers else {}
    out = triton.compile(source, target=GPUTarget("cuda", arch, WARP), options=options)
    passed = [name for name in signature if signature[name] != "constexpr"]
    pointers = [name if signature[name].startswith("*") else None for name in passed]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(out.asm["cubin"])
        (used,) = filter(None, map(usage, cuobjdump(Path(file.name)).splitlines()))
    return used, *_widths(out.asm["ptx"], pointers)


def bytes_moved(case: Case, launch: Launch) -> int:
    """Every element of every tensor argument once, or as often as the case says."""
    tensors = {n: v for n, v in launch.arguments.items() if isinstance(v, torch.Tensor)}
    return round(sum(tensor.nbytes * case.passes.get(n, 1) for n, tensor in tensors.items()))


def row_arguments(launch: Launch) -> Iterator[str]:
    """The 16-bit tensors with at least one row to a token, of a width that 16 bytes divide."""
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and value.element_size() == 2:
            width = value.shape[-1]
            if value.numel() // width >= B * T and 2 * width % ALIGNED == 0:
                yield name


def cuobjdump(path: Path) -> str:
    """What each kernel of a file uses, by Triton's own copy of the tool."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "-res-usage", path]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def usage(line: str) -> dict[str, int] | None:
    """What a kernel uses, of a thread and of a program; None where a line says nothing of it."""
    found = _USAGE.search(line)
    return found and {name: int(number) for name, number in found.groupdict().items()}


def _widths(ptx: str, pointers: list[str | None]) -> tuple[Widths, Widths]:
    """Bytes of each load and store of global memory, by the argument its address comes from."""
    origin, widths = {}, {"ld": {}, "st": {}}
    for line in ptx.splitlines():
        if found := _LOAD_PARAM.search(line):
            register, index = found.groups()
            # past the arguments are pointers to scratch that Triton itself passes
            origin[register] = dict(enumerate(pointers)).get(int(index))
        elif found := _ACCESS.search(line):
            kind, vector, bits, address = found.groups()
            width = int(vector[2:] or 1) * int(bits) // 8
            widths[kind].setdefault(origin.get(address), set()).add(width)
        else:
            # a number computed from one argument's address is an address in that argument
            target, *sources = _REGISTER.findall(line) or [None]
            found = {origin.get(source) for source in sources} - {None}
            if len(found) == 1:
                origin[target] = found.pop()
    return tuple({n: tuple(sorted(w)) for n, w in widths[kind].items() if n} for kind in widths)


# of the compiled library


def library_rows() -> list[dict[str, object]]:
    """By kernel and architecture; none where the library does not serve or is without CUDA."""
    loaded = library.library()
    if loaded.reason is not None or not loaded.manifest.cuda:
        return []
    rows = read_usage(cuobjdump(library.PATH))
    return sorted(rows, key=lambda row: (row["kernel"], row["arch"]))


def read_usage(text: str) -> Iterator[dict[str, object]]:
    """The rows of what cuobjdump prints, which has one section to an architecture."""
    arch = name = None
    for line in text.splitlines():
        if found := _ARCH.match(line):
            arch = int(found[1])
        elif found := _FUNCTION.match(line):
            name = short_name(found[1])
        elif name and (used := usage(line)):
            yield {"kernel": name, "arch": arch, **used}
            name = None


@cache
def short_name(symbol: str) -> str:
    """Without namespaces and arguments; the symbol itself where nothing here can read it."""
    if shutil.which("c++filt") is None:
        return symbol
    command = ["c++filt", symbol]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    text = _NAMESPACES.sub("", text).removeprefix("void ")
    # the arguments follow the name, or the > that ends its template's
    return re.match(r"\w+(?:<.*?>(?=\())?", text)[0]
