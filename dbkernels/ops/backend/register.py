"""Give the launchers of an op one name that the compiler can see, and choose which of them runs.

An op writes into tensors that its caller allocated and returns nothing: what a step allocates is
then visible to whoever counts it, and a fake implementation has nothing to do.

Its schema is written once, beside its launchers. Compiled code implements the op of the same name
in the namespace dbkernels_compiled, and need not be there.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal, get_args

import torch
import triton
from torch import Tensor
from torch._ops import OpOverload

from dbkernels.ops.backend import library
from dbkernels.settings import check_choice

Implementation = Literal["cpp", "cuda", "triton", "torch"]
NAMES: tuple[Implementation, ...] = get_args(Implementation)

_LIBRARY = torch.library.Library("dbkernels", "DEF")
_COMPILED = torch.library.Library("dbkernels_compiled", "DEF")
_FLOAT32 = 4  # bytes: of a partial sum
_asked_for: list[Implementation] = []
_ops: dict[str, Callable | None] = {}  # elements that a launch allocates and frees again
_processors: list[int] = []  # of the GPU of a dry run, innermost last


def register(
    schema: str,
    *,
    triton: Callable,
    torch_: Callable,
    check: Callable | None = None,
    scratch: Callable | None = None,
) -> Callable:
    """Register two launchers with the same arguments under `schema`; return the op.

    Where the first tensor is empty no launcher runs, and what the op writes is a sum of nothing.
    `check` looks at values, and raises before anything is written. It is called where that does not
    wait for a GPU, and not in the public function: compilers and fake tensors have no values.
    `scratch` counts the float32 partial sums of Triton's launcher, which no dispatcher sees.
    """
    name = schema.partition("(")[0]
    _ops[name] = scratch
    _COMPILED.define(schema.replace("SymInt", "int"))
    compiled = getattr(torch.ops.dbkernels_compiled, name).default
    launchers = {"triton": triton, "torch": torch_, "cpp": compiled, "cuda": compiled}
    reads = [argument.alias_info is None for argument in compiled._schema.arguments]

    def launch(*args):
        if not args[0].numel():
            for arg, is_read in zip(args, reads, strict=True):
                if not is_read and arg is not None:
                    arg.zero_()
            return
        device = args[0].device
        if check is not None and device.type == "cpu":
            check(*args)
        chosen = _choose(name, device, float64=_float64_is_chosen(args, reads))
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            launchers[chosen](*args)

    _LIBRARY.define(schema)
    # torch.library.custom_op does the same for about three times the host time per call
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dbkernels::{name}", lambda *args: None, lib=_LIBRARY)
    return getattr(torch.ops.dbkernels, name).default


def registered() -> tuple[str, ...]:
    """The ops by name, such as gelu_fwd."""
    return tuple(_ops)


def implementation(device: torch.device | str, op: str | None = None) -> Implementation:
    """What runs an op on a device: what was asked for, else compiled code where there is some.

    Args:
        device:  of the op's tensors, which are not float64: plain torch alone takes those
        op:      by name, such as gelu_fwd; None is one without compiled code
    Raises:
        ValueError: there is no such op.
    """
    if _asked_for:
        return _asked_for[-1]
    device = torch.device(device)
    if op is not None:
        check_choice("op", op, _ops)
        if library.serves(op, device):
            return library.NAMES[device.type]
    return "triton" if device.type == "cuda" else "torch"


def use_implementation(name: Implementation) -> AbstractContextManager:
    """Run the ops of this process by name; for tests, benchmarks and the search for a fault.

    Args:
        name:  "cpp" or "cuda", compiled for a CPU or a GPU, and then an op that has no such code
               raises RuntimeError; "triton"; "torch", which is plain torch
    Raises:
        ValueError: the name is unknown.
        RuntimeError: nothing here runs it: no GPU, no compiled library, no interpreter of Triton.
    """
    check_choice("implementation", name, NAMES)
    if name == "triton" and not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        needed = "an NVIDIA GPU, or TRITON_INTERPRET=1 set before dbkernels is imported"
        raise RuntimeError(f"implementation triton needs {needed}")
    reason = library.library().reason if name == "cpp" else None
    if name == "cuda":
        reason = library.cuda_reason(torch.device("cuda"))
    if reason is not None:
        raise RuntimeError(f"implementation {name} cannot run: {reason}")
    return _innermost(_asked_for, name)


@contextmanager
def _innermost(stack: list, value: object) -> Iterator[None]:
    """The last of a stack until the context ends."""
    stack.append(value)
    try:
        yield
    finally:
        stack.pop()


def _choose(op: str, device: torch.device, *, float64: bool) -> Implementation:
    """The implementation of one call, which exists."""
    chosen = implementation(device, op)
    if chosen in ("triton", "torch"):
        if device.type == "cpu" and not _asked_for:
            library.warn_where_missing()
        return chosen
    if not _asked_for:
        return "torch" if float64 else chosen
    compiled = [library.NAMES[device.type]] if library.serves(op, device) else []
    if chosen not in compiled:
        there = ", ".join([*compiled, "triton", "torch"])
        raise RuntimeError(f"{op} has no implementation {chosen} on {device.type}, it has {there}")
    return chosen


def _float64_is_chosen(args: tuple, reads: list[bool]) -> bool:
    """Whether a tensor is float64 and one that is read has floats.

    An op that reads none, at most integers, has float64 in its output by its meaning and not by its
    caller's choice.
    """
    tensors = [each for each in zip(args, reads, strict=True) if isinstance(each[0], Tensor)]
    wide = any(tensor.dtype == torch.float64 for tensor, _ in tensors)
    return wide and any(read and tensor.is_floating_point() for tensor, read in tensors)


# fake tensors of a CPU on which ops run as on a GPU: what a prediction of memory runs on


def scratch_bytes(func: OpOverload, args: tuple) -> int:
    """Bytes that one call of an op allocates inside itself and frees again.

    Their number is that of the launch itself, on the GPU of a dry run.

    Args:
        func:  any op; those of others, and those without partial sums, have 0
        args:  that it was called with
    """
    scratch = _ops.get(func._opname) if func.namespace == "dbkernels" else None
    return _FLOAT32 * scratch(*args) if scratch is not None and args[0].numel() else 0


def runs_as_on_gpu(tensor: Tensor) -> bool:
    """Whether to do as on a GPU, where it and a CPU have different ways."""
    return tensor.is_cuda or bool(_processors)


def dry_run_processors() -> int | None:
    """Streaming multiprocessors of the GPU of a dry run; None where there is none."""
    return _processors[-1] if _processors else None


def dry_run_on_gpu(processors: int) -> AbstractContextManager:
    """Do with a CPU's fake tensors as on a GPU with so many streaming multiprocessors."""
    return _innermost(_processors, processors)


# what a function with matmuls of its own must know of the autocast and the graph it runs in


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matmuls of x and weight: autocast's where it is on, else the weight's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which meta tensors do not have
        return torch.get_autocast_dtype(device)
    return weight.dtype


def dtypes_as_they_are(device: str) -> AbstractContextManager:
    """A backward has the dtypes of its forward, also where it is called under autocast."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def is_last_to_read() -> bool:
    """Whether what was saved may be written over: not with retain_graph=True."""
    # a compiler reuses memory on its own, and its trace knows no graph task
    if torch.compiler.is_compiling():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()
