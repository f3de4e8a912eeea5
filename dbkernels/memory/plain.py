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
        cls, inside: dict[str, Tensor], told: object, size: object, stride: object
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
    for inside in cast(Wrapper, value).__tensor_flatten__()[0]:
        yield from plain_tensors(f"{name}.{inside}", getattr(value, inside))


def copy_of(value: Tensor) -> Tensor:
    """A tensor of its own with the same numbers; of a wrapper, around copies of what it wraps."""
    if not is_wrapper(value):
        return value.detach().clone()
    names, told = cast(Wrapper, value).__tensor_flatten__()
    inside = {name: copy_of(getattr(value, name)) for name in names}
    return _wrapped(value, inside, told)


def where_it_lies(value: Tensor) -> Tensor:
    """A wrapper that says the device on which what it wraps lies, which was moved beneath it."""
    names, told = cast(Wrapper, value).__tensor_flatten__()
    inside = {name: getattr(value, name) for name in names}
    if all(tensor.device == value.device for tensor in inside.values()):
        return value
    return _wrapped(value, inside, told)


def _wrapped(like: Tensor, inside: dict[str, Tensor], told: object) -> Tensor:
    kind = cast(type[Wrapper], type(like))
    return kind.__tensor_unflatten__(inside, told, like.shape, like.stride())
