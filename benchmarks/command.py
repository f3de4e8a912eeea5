"""The command line of a benchmark, from the dataclass of its options."""

import shlex
import sys
from pathlib import Path
from typing import TypeVar

import tyro

Options = TypeVar("Options")


def parsed(kind: type[Options]) -> Options:
    """What was asked for; ends with 2 and a sentence where it is wrong."""
    return tyro.cli(kind)


def called() -> str:
    """What was typed, as it can be repeated in the checkout; without --json it prints a table."""
    arguments = (argument for argument in sys.argv[1:] if argument != "--json")
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *arguments])
