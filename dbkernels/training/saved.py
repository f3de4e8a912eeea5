"""What a checkpoint holds is what the trainer saves: names, shapes, dtypes, finite, counts.

Its hash says that it is what was written; not that a trainer of this run has written it.
"""

import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import TYPE_CHECKING, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def require_tensors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], group: str, *, some: bool = False
) -> None:
    """Refuse tensors that are not like those that they will take the place of.

    Args:
        found:     by name, of a checkpoint
        expected:  by name
        group:     what they are, for the message
        some:      whether names may lack
    Raises:
        ValueError: with the first name that is missing, unknown, or of another shape or dtype, or
                    not finite.
    """
    names = sorted(found) if some else sorted({*found, *expected})
    for name in names:
        wanted, got = (_kind(tensors.get(name)) for tensors in (expected, found))
        if got == wanted and not found[name].isfinite().all():
            got = f"{got} that is not finite"
        if got != wanted:
            raise ValueError(f"{group} {name} must be {wanted}, got {got}")


def _kind(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def require_types(config: "DataclassInstance") -> None:
    """Refuse a configuration from a file in which a setting is of another type than its own.

    Raises:
        ValueError: with the first of them.
    """
    hints = get_type_hints(type(config))
    for each in fields(config):
        value, hint = getattr(config, each.name), hints[each.name]
        if is_dataclass(value) and not isinstance(value, type):
            require_types(value)
        elif not _has_type(value, hint):
            kind = getattr(hint, "__name__", hint) if get_origin(hint) is None else hint
            raise ValueError(f"{each.name} must be {kind}, got {value!r:.60}")


def _has_type(value: object, hint: object) -> bool:
    if get_origin(hint) is UnionType:
        return any(_has_type(value, each) for each in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, tuple | list)  # as JSON has it
    kinds: dict[object, type | tuple[type, ...]] = {
        float: (int, float),
        int: int,
        bool: bool,
        str: str,
        type(None): type(None),
    }
    kind = kinds.get(hint, object)
    return isinstance(value, kind) and (hint is bool or not isinstance(value, bool))


def require_counters(found: object, expected: dict, name: str = "counters") -> None:
    """Refuse counts that are not whole numbers from 0, or not those that a trainer has.

    Where the trainer's is a float, any finite number may be there.

    Raises:
        ValueError: with the first of them.
    """
    if not isinstance(found, dict) or found.keys() != expected.keys():
        got = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{name} must have {', '.join(expected)}, got {got}")
    for key, value in expected.items():
        if isinstance(value, dict):
            require_counters(found[key], value, key)
        elif isinstance(value, float):
            if type(found[key]) not in (int, float) or not math.isfinite(found[key]):
                raise ValueError(f"{name} {key} must be a finite number, got {found[key]}")
        elif type(found[key]) is not int or found[key] < 0:
            raise ValueError(f"{name} {key} must be a whole number from 0, got {found[key]}")
