"""The command line: parse, run one verb, say errors in one sentence."""

import sys
from collections.abc import Sequence
from typing import Annotated

import torch
import tyro
from rich.console import Console

from dbkernels.cli.doctor import Doctor
from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.train import Train
from dbkernels.memory.measure import out_of_memory

Verb = (
    Annotated[Train, tyro.conf.subcommand("train")]
    | Annotated[Sample, tyro.conf.subcommand("sample")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Profile, tyro.conf.subcommand("profile")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Doctor, tyro.conf.subcommand("doctor")]
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exit with 1 for a mistake that one sentence names, with 2 for a bad flag."""
    verb = tyro.cli(
        Verb,
        prog="python -m dbkernels",
        description="Train deep residual transformers one block at a time.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
    try:
        verb.run()
    except (ValueError, FloatingPointError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        _report(error)
        sys.exit(1)
    except RuntimeError as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        _report(MemoryError(reason))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _report(error: Exception) -> None:
    text = str(error)
    if isinstance(error, OSError) and error.filename:
        text = f"{error.strerror}: {error.filename}"
    # whole lines: a message that is cut at the terminal's width cannot be searched for
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"error: {text}", style="red", markup=False, highlight=False)
