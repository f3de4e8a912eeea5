"""What makes a number of the results one, and the levels of a step a picture."""

import sys

DRAWN = ("starts", "phases", "levels")  # of a step that is drawn op after op


def is_positive(value: object, or_zero: bool) -> bool:
    """Whether a value is a number of a size that can be drawn.

    Args:
        value:    what the results hold
        or_zero:  whether 0 is one too
    Returns:
        False for what is no number, below 0, infinite or NaN.
    """
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and (0 < value <= sys.float_info.max or (or_zero and value == 0))


def check_levels(row: dict[str, object]) -> None:
    """Check what is drawn of a step.

    Args:
        row:  of the suite timeline
    Raises:
        ValueError: the ops do not rise, a category has another number of parts, or a phase is no
            name and op.
    """
    starts, phases, levels = (row[name] for name in DRAWN)
    if not _are_ops(starts) or len(starts) < 2:
        raise ValueError(f"starts must be ops in rising order, two or more, got {starts!r:.40}")
    if not isinstance(levels, dict) or not levels:
        raise ValueError(f"levels must be bytes by category, got {levels!r:.40}")
    for name, sizes in levels.items():
        if not isinstance(sizes, list) or not all(is_positive(size, True) for size in sizes):
            raise ValueError(f"levels must be lists of bytes, got {sizes!r:.40} for {name}")
        if len(sizes) != len(starts):
            raise ValueError(
                f"levels must have a number for each of {len(starts)} starts, "
                f"got {len(sizes)} for {name}"
            )
    pairs = isinstance(phases, list) and all(isinstance(p, list) and len(p) == 2 for p in phases)
    if not pairs or not all(isinstance(name, str) for name, _ in phases):
        raise ValueError(f"phases must be pairs of a name and its first op, got {phases!r:.40}")
    if not _are_ops([op for _, op in phases]):
        raise ValueError(f"phases must begin at ops in rising order, got {phases!r:.40}")


def _are_ops(values: object) -> bool:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        return False
    return all(a < b for a, b in zip([-1, *values], values, strict=False))
