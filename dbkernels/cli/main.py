"""The command line: parse, run one verb, say errors in one sentence."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import tyro
from rich.console import Console

from dbkernels.cli.doctor import Doctor
from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.train import Train
from dbkernels.memory.measure import out_of_memory

Verb = Train | Sample | Evaluate | Profile | Plan | Doctor


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
    except OSError as error:
        _exit(f"{error.strerror}: {error.filename}" if error.filename else str(error))
    except (ValueError, FloatingPointError) as error:
        _exit(str(error))
    except (RuntimeError, MemoryError) as error:
        reason = out_of_memory(error)
        if reason is None:
            raise
        _exit(reason)
    except KeyboardInterrupt:
        sys.exit(130)


def _exit(text: str) -> NoReturn:
    # whole lines: a message that is cut at the terminal's width cannot be searched for
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"error: {text}", style="red", markup=False, highlight=False)
    sys.exit(1)
