"""What a name may be: one check and one message for every setting that is chosen by name."""

from collections.abc import Collection


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
