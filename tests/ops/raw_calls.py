"""The raw ops that a function calls, and what holds for every one of them."""

import math
from collections.abc import Callable
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops.backend.register import scratch_bytes

FLOAT32 = 4  # bytes
GUARD, UNTOUCHED = 32, 2.0**14  # elements beside an output, and what they hold


class Calls(TorchDispatchMode):
    """Notes the raw ops that are called, with copies of their arguments."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dbkernels":
            copies = [a.detach().clone() if isinstance(a, Tensor) else a for a in args]
            self.found.append((func, tuple(copies)))
        return func(*args, **(kwargs or {}))


class Scratch(TorchDispatchMode):
    """Scratch of each op, by name: what is counted, and what its launcher allocates."""

    def __init__(self):
        super().__init__()
        self.bytes, self.allocated = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("dbkernels::")
        if size := scratch_bytes(func, args):
            self.bytes[name] = size
        if func.namespace != "dbkernels":
            return func(*args, **(kwargs or {}))
        # nothing else in a launcher makes a tensor by this name
        with patch.object(torch, "empty", wraps=torch.empty) as empty:
            func(*args)
        if empty.called:
            shapes = (call.args[0] for call in empty.call_args_list)
            self.allocated[name] = FLOAT32 * sum(map(math.prod, shapes))


def calls_of(function: Callable[[], object]) -> list[tuple]:
    """Every raw op that a function calls, and what it is given there."""
    with Calls() as calls:
        function()
    assert calls.found
    return calls.found


def opcheck_calls(function: Callable[[], object]) -> None:
    for func, args in calls_of(function):
        torch.library.opcheck(func, args)


def assert_calls_stay_within_their_tensors(function: Callable[[], object]) -> None:
    """All outputs are written, and nothing beside them; and nothing beside an input has a part.

    All are parts of larger buffers, as a caller may pass them. What was never written is NaN.
    """
    for func, args in calls_of(function):
        written = [argument.alias_info is not None for argument in func._schema.arguments]
        args = [
            _amid(arg, UNTOUCHED if is_written else torch.nan)
            if isinstance(arg, Tensor) and arg.is_floating_point()
            else arg
            for arg, is_written in zip(args, written, strict=True)
        ]
        func(*args)
        for arg, is_written in zip(args, written, strict=True):
            if is_written and arg is not None:
                whole = arg._base
                beside = torch.cat([whole[:GUARD], whole[-GUARD:]])
                assert (beside == UNTOUCHED).all() and not arg.isnan().any(), func


def _amid(tensor: Tensor, guard: float) -> Tensor:
    whole = tensor.new_full((tensor.numel() + 2 * GUARD,), guard)
    return whole[GUARD:-GUARD].view(tensor.shape).copy_(tensor)
