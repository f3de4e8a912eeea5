"""What a setting may be: one check and one message for names, and one for numbers."""

from collections.abc import Collection

MOST = 2**31 - 1  # of any count
MOST_SEED = 2**63 - 1
MOST_SAMPLES = 2**20  # of a batch: to list more of them takes longer than anybody waits


def check_choice(name: str, value: object, known: Collection[str]) -> None:
    """Refuse a value that is not one of the known names.

    Args:
        name:   of the setting, as its caller spells it
        value:  what was given
        known:  the names in the order in which the error tells them; a dictionary's keys will do
    Raises:
        ValueError: the value is not known.
    """
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value}")


def check_number(name: str, value: float, least: float, most: float = MOST) -> None:
    """Refuse a number that is too small or too large, or is none.

    Args:
        name:   of the setting, as its caller spells it
        value:  what was given
        least:  the smallest that is allowed
        most:   the largest
    Raises:
        ValueError: the value is not from the least to the most.
    """
    if not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")
