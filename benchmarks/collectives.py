"""What a step hands to other GPUs and to the host, counted op by op.

Of a collective its whole buffer counts: what is gathered, what is reduced and scattered, what is
summed. A ring of n GPUs sends (n - 1) / n of the first two, and twice that of the last; neither
factor is in the count. What is received point to point counts where it is sent.
"""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dbkernels.training.offload.activations import Copies
from dbkernels.training.trainer import Trainer

KINDS = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "allgather_into_tensor_coalesced_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor_coalesced_": "reduce_scatter",
    "reduce_scatter_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "allreduce_coalesced_": "all_reduce",
    "send": "send",
}
QUIET = ("recv_", "barrier", "monitored_barrier_")  # which hand nothing over
HOST = "host"  # bytes that are copied to the host and back


class Collectives(TorchDispatchMode):
    """Counts bytes by the kind of collective within it, in `bytes`."""

    def __init__(self):
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and name not in QUIET:
            # of what goes in and what comes out the larger one is the whole
            self.bytes[KINDS[name]] += max(map(_bytes, args), default=0)
        return func(*args, **(kwargs or {}))


def _bytes(argument: object) -> int:
    return sum(t.nbytes for t in tree_leaves(argument) if isinstance(t, Tensor))


@contextmanager
def counting() -> Iterator[list[Counter[str]]]:
    """The bytes of every step that a trainer takes within, by kind, and by HOST what it copies."""
    steps: list[Counter[str]] = []
    advance = Trainer.advance

    def counted(trainer: Trainer, block: object) -> tuple[Tensor, ...]:
        with Collectives() as found:
            steps.append(found.bytes)
            return advance(trainer, block)

    def copied(name: str) -> mock._patch:
        copy = getattr(Copies, name)

        def of_bytes(copies: Copies, flat: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
            if steps:
                steps[-1][HOST] += len(flat)
            return copy(copies, flat)

        return mock.patch.object(Copies, name, of_bytes)

    with mock.patch.object(Trainer, "advance", counted), copied("store"), copied("load"):
        yield steps
