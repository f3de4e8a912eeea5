"""Bytes as people write and read them."""

import re

UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def bytes_from(text: str, *, name: str = "memory") -> int:
    """Bytes from a number and its unit, such as 24GiB or "1.5 GiB".

    Args:
        text:  the number is positive
        name:  of what is asked for, for the message
    Raises:
        ValueError: it is anything else.
    """
    found = re.fullmatch(rf"(\d+\.?\d*|\.\d+) ?({'|'.join(UNITS)})", text.strip(), re.ASCII)
    size = int(float(found[1]) * UNITS[found[2]]) if found else 0
    if size < 1:
        units = ", ".join(UNITS)
        raise ValueError(
            f"{name} must be a positive number and one of {units}, such as 24GiB, got {text}"
        )
    return size


def in_words(size: float) -> str:
    """Bytes with the largest unit of which there is one, three digits of them or more."""
    unit = unit_of(size)
    return f"{three_digits(size / UNITS[unit])} {unit}"


def unit_of(size: float) -> str:
    """The largest of UNITS that bytes have one of; the smallest where they have none."""
    return next((unit for unit in reversed(UNITS) if abs(size) >= UNITS[unit]), "KiB")


def three_digits(value: float) -> str:
    """A number with three digits, or with all of those before the point."""
    digits = 2 if abs(value) < 10 else 1 if abs(value) < 100 else 0
    return f"{value:.{digits}f}"
