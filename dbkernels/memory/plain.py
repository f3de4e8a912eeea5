"""The plain tensors that a wrapper of several holds, such as a moment of torchao's optimizers."""

from collections.abc import Iterator
from typing import Protocol, cast

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type


class Wrapper(Protocol):
    """What torch asks of a tensor that holds others."""

    def __tensor_flatten__(self) -> tuple[list[str], object]: ...

    @classmethod
    def __tensor_unflatten__(
        cls, inside: dict[str, object], told: object, size: object, stride: object
    ) -> Tensor: ...


def is_wrapper(value: object) -> bool:
    """Whether it is a tensor, or the type of one, that holds others in place of numbers."""
    kind = value if isinstance(value, type) else type(value)
    return is_traceable_wrapper_subclass_type(kind)


def plain_tensors(name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor by its name, or those that it wraps, as `<name>.<name inside>`."""
    if not is_wrapper(value):
        yield name, value
        return
    for inside, held in _held(value).items():
        # a DTensor tells its mesh too
        if isinstance(held, Tensor):
            yield from plain_tensors(f"{name}.{inside}", held)


def copy_of(value: Tensor) -> Tensor:
    """A tensor of its own with the same numbers; of a wrapper, around copies of what it wraps."""
    if not is_wrapper(value):
        return value.detach().clone()
    inside = _held(value).items()
    return _wrapped(value, {n: copy_of(t) if isinstance(t, Tensor) else t for n, t in inside})


def where_it_lies(value: Tensor) -> Tensor:
    """A wrapper that says the device on which what it wraps lies, which was moved beneath it."""
    inside = _held(value)
    if all(t.device == value.device for t in inside.values() if isinstance(t, Tensor)):
        return value
    return _wrapped(value, inside)


def _held(value: Tensor) -> dict[str, object]:
    names, _ = cast(Wrapper, value).__tensor_flatten__()
    return {name: getattr(value, name) for name in names}


def _wrapped(like: Tensor, inside: dict[str, object]) -> Tensor:
    kind, (_, told) = cast(type[Wrapper], type(like)), cast(Wrapper, like).__tensor_flatten__()
    return kind.__tensor_unflatten__(inside, told, like.shape, like.stride())
