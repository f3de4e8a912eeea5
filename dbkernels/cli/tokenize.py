"""`python -m dbkernels tokenize`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import Positional

from dbkernels.cli.progress import ProgressBar
from dbkernels.data.tokenize import TokenizeConfig, tokenize

MIB = 2**20


@dataclass(frozen=True)
class Tokenize(TokenizeConfig):
    """Turn text into tokens, once, for runs to train on; one that was stopped goes on."""

    inputs: Annotated[
        Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="INPUT [INPUT ...]", help_behavior_hint="(required)"),
    ]
    """Text files, and folders of them; a .jsonl file has an object with a text in each line, and
    .gz is unpacked."""
    test: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="PATHS", help_behavior_hint="(default: none)")
    ] = ()
    """Files and folders that are held out to test on."""

    def __post_init__(self) -> None:
        pass

    def run(self) -> None:
        config = TokenizeConfig(**{name: getattr(self, name) for name in self.__dataclass_fields__})
        with ProgressBar("tokenizing", 0, "MiB") as shown:

            def told(done: int, total: int) -> None:
                shown.total = -(-total // MIB)
                shown.step(-(-done // MIB), "of text")

            found = tokenize(config, told)
        print(f"wrote {found.vocabulary} words of tokenizer {found.tokenizer}: {self.out}")
        for split, counts in found.splits.items():
            print(f"{split}: {counts.tokens:,} tokens in {counts.documents:,} documents")
