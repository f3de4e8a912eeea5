"""What FSDP2 does to the memory of a step that no op tells, and what its ops tell.

A sharded weight is gathered for its layer and let go of after it by a change of its storage's size,
so that views which autograd has saved stay its views. No op is called for it.

What is whole for a time counts with what it is a whole of: a gathered weight is a parameter, and
the gradient of one is a gradient. The buffers of the collectives are temporaries.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import UntypedStorage


@contextmanager
def seeing_resizes(tell: Callable[[UntypedStorage, int], object]) -> Iterator[None]:
    """Call `tell` with each storage that changes its size within, and the bytes it had before."""
    # the method is inherited: what stands here is of another that sees
    resize, outer = UntypedStorage.resize_, vars(UntypedStorage).get("resize_")

    def resize_and_tell(storage: UntypedStorage, size: int) -> UntypedStorage:
        before = storage.nbytes()
        resize(storage, size)
        tell(storage, before)
        return storage

    _put(resize_and_tell)
    try:
        yield
    finally:
        _put(outer)


def _put(resize: Callable[[UntypedStorage, int], UntypedStorage] | None) -> None:
    if resize is None:
        del UntypedStorage.resize_
    else:
        UntypedStorage.resize_ = resize  # type: ignore[method-assign, assignment]


def whole(op: str, args: tuple, kwargs: dict) -> tuple[object, str] | None:
    """The tensors of one of FSDP2's ops that are whole for a time, and their category.

    None of any other op. Weights are sharded along their first dimension.
    """
    if op == "fsdp::split_with_sizes_copy":  # of what was gathered, into the weights
        return kwargs["out"], "parameters"
    if op == "fsdp::chunk_cat":  # of gradients, into what is reduced and scattered
        return args[0], "gradients"
    return None
