"""The command line of a benchmark, from the dataclass of its options."""

import sys
from typing import TypeVar

Options = TypeVar("Options")


def parsed(kind: type[Options]) -> Options:
    """What was asked for; ends with 2 and a sentence where it is wrong.

    A bare GPU machine may lack tyro, so --json alone does without it.
    """
    if sys.argv[1:] == ["--json"]:
        return kind(json=True)
    import tyro

    return tyro.cli(kind)
