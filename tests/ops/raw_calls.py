"""The raw ops that a function calls, and what holds for every one of them."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

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


def calls_of(function: Callable[[], object]) -> list[tuple]:
    """Every raw op that a function calls, and what it is given there."""
    with Calls() as calls:
        function()
    assert calls.found
    return calls.found


def opcheck_calls(function: Callable[[], object]) -> None:
    for func, args in calls_of(function):
        torch.library.opcheck(func, args)


def assert_calls_write_their_outputs_alone(function: Callable[[], object]) -> None:
    """All of them and nothing beside, in parts of larger buffers, as a caller may pass them.

    What was never written is NaN, as in all of these tests.
    """
    for func, args in calls_of(function):
        buffers, arguments = [], func._schema.arguments
        args = [
            _amid(buffers, arg) if argument.alias_info and arg is not None else arg
            for argument, arg in zip(arguments, args, strict=True)
        ]
        func(*args)
        for buffer in buffers:
            assert (buffer[:GUARD] == UNTOUCHED).all() and (buffer[-GUARD:] == UNTOUCHED).all()
            assert not buffer.isnan().any(), func


def _amid(buffers: list[Tensor], tensor: Tensor) -> Tensor:
    buffers.append(tensor.new_full((tensor.numel() + 2 * GUARD,), UNTOUCHED))
    return buffers[-1][GUARD:-GUARD].view(tensor.shape).copy_(tensor)
