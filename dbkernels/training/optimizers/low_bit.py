"""AdamW whose moments have 8 or 4 bits a number, by torchao: a quarter, or an eighth, of the bytes.

Dettmers et al. 2022 (arXiv:2110.02861), and Li et al. 2023 (arXiv:2309.01507) for 4 bits. torchao
keeps moments of few numbers in float32. It compiles its step on a GPU; on a CPU, where
to compile takes longer than to train a small model, and on fake tensors it runs op by op.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, Protocol, cast

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.optim import Optimizer

from dbkernels.training.optimizers.kind import State, Trained, groups_of
from dbkernels.training.optimizers.skipping import skipping

MOMENTS = {"exp_avg": True, "exp_avg_sq": False}  # and whether they have signs
FEWEST = 4096  # numbers of a tensor whose moments torchao keeps in few bits


class Buffers(Protocol):
    """What torchao's optimizers make a moment by."""

    def _new_buffer(self, p: Tensor, signed: bool) -> Tensor: ...


class LowBitAdamW:
    """torchao's AdamW.

    Args:
        bits:  of a number of a moment
    """

    capturable = by_element = False
    counts: tuple[str, ...] = ()

    def __init__(self, bits: Literal[4, 8]):
        self.name, self._bits = f"adamw{bits}bit", bits

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """As `Kind.make`."""
        try:
            from torchao import optim
        except ImportError:
            raise ValueError(
                f"torchao must be installed for {self.name} (pip install dbkernels[torchao]), "
                "got an environment without it"
            ) from None
        kind = {4: optim.AdamW4bit, 8: optim.AdamW8bit}[self._bits]
        made = skipping(_op_by_op_on_a_cpu(kind))(groups_of(trained))
        with unset_fake_temporarily(), torch.device("cpu"):
            # torchao's tables of values are made once in a process, from numbers
            for signed in MOMENTS.values():
                cast(Buffers, made)._new_buffer(torch.zeros(FEWEST, dtype=torch.float32), signed)
        return [made]

    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """As `Kind.state`."""
        of_tensor = tensor.detach()
        buffers = cast(Buffers, optimizer)
        found = {name: buffers._new_buffer(of_tensor, of) for name, of in MOMENTS.items()}
        # torchao would count on the host, where a step that is left out cannot be taken back
        step = torch.zeros((), dtype=torch.float32, device=tensor.device)
        return {"step": step, **found}


def _op_by_op_on_a_cpu(kind: type[Optimizer]) -> type[Optimizer]:
    def step(self: Optimizer, closure: None = None) -> None:
        with _stance(next(t for group in self.param_groups for t in group["params"])):
            kind.step(self, closure)

    return type(kind.__name__, (kind,), {"step": step})


def _stance(tensor: Tensor) -> AbstractContextManager:
    compiles = tensor.is_cuda and not isinstance(tensor.data, FakeTensor)
    return nullcontext() if compiles else torch.compiler.set_stance("force_eager")
