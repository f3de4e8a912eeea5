"""What a checkpoint holds is what the trainer saves: names, shapes, dtypes, finite, counts.

Its hash says that it is what was written; not that a trainer of this run has written it.
"""

from torch import Tensor


def require_tensors(
    found: dict[str, Tensor], expected: dict[str, Tensor], group: str, *, some: bool = False
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


def require_counters(found: object, expected: dict, name: str = "counters") -> None:
    """Refuse counts that are not whole numbers from 0, or not those that a trainer has.

    Raises:
        ValueError: with the first of them.
    """
    if not isinstance(found, dict) or found.keys() != expected.keys():
        got = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{name} must have {', '.join(expected)}, got {got}")
    for key, value in expected.items():
        if isinstance(value, dict):
            require_counters(found[key], value, key)
        elif type(found[key]) is not int or found[key] < 0:
            raise ValueError(f"{name} {key} must be a whole number from 0, got {found[key]}")
