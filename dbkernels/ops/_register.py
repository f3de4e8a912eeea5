"""Give a pair of launchers one name that the compiler can see, and choose which of them runs.

An op writes into tensors that its caller allocated and returns nothing: what a step allocates is
then visible to whoever counts it, and a fake implementation has nothing to do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
import triton

Implementation = Literal["triton", "torch"]

_LIBRARY = torch.library.Library("dbkernels", "DEF")
_asked_for: list[Implementation] = []


def register(schema: str, *, triton: Callable, torch_: Callable) -> Callable:
    """Register two launchers with the same arguments under `schema`; return the op."""

    def launch(*args):
        device = args[0].device
        if implementation(device) == "torch":
            torch_(*args)
            return
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            triton(*args)

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    # torch.library.custom_op does the same for about three times the host time per call
    _LIBRARY.impl(name, launch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dbkernels::{name}", lambda *args: None, lib=_LIBRARY)
    return getattr(torch.ops.dbkernels, name).default


def implementation(device: torch.device | str) -> Implementation:
    """What runs the ops on a device: what was asked for, else Triton on an NVIDIA GPU."""
    if _asked_for:
        return _asked_for[-1]
    return "triton" if torch.device(device).type == "cuda" else "torch"


@contextmanager
def use_implementation(name: Implementation) -> Iterator[None]:
    """Run the ops of this process by name; for tests, benchmarks and the search for a fault.

    Raises:
        ValueError: the name is unknown.
        RuntimeError: there is no GPU and no interpreter for Triton to run on.
    """
    if name not in ("triton", "torch"):
        raise ValueError(f"implementation must be triton or torch, got {name}")
    if name == "triton" and not (torch.cuda.is_available() or triton.knobs.runtime.interpret):
        raise RuntimeError(
            "implementation triton needs an NVIDIA GPU, or TRITON_INTERPRET=1 in the environment "
            "before dbkernels is imported"
        )
    _asked_for.append(name)
    try:
        yield
    finally:
        _asked_for.pop()
