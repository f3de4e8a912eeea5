"""The command line: parse, run one verb, say errors in one sentence."""

from collections.abc import Sequence
from pathlib import Path

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
)

from dbkernels.cli.doctor import Doctor
from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.merge import Merge
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.sentence import in_a_sentence
from dbkernels.cli.tokenize import Tokenize
from dbkernels.cli.train import Train

Verb = Train | Merge | Sample | Evaluate | Tokenize | Profile | Plan | Doctor


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb; exit with 1 for a mistake that one sentence names, with 2 for a bad flag."""
    verb = tyro.cli(
        Verb,
        prog="python -m dbkernels",
        description="Train deep residual transformers one block at a time.",
        args=arguments,
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
        registry=_paths(),
    )
    with in_a_sentence():
        verb.run()


def _paths() -> ConstructorRegistry:
    """How a path is read: an empty text is none, and would else be the current directory."""
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Path] | None:
        if info.type is not Path:
            return None
        return PrimitiveConstructorSpec(
            nargs=1,
            metavar="PATH",
            instance_from_str=lambda words: _path(*words),
            is_instance=lambda value: isinstance(value, Path),
            str_from_instance=lambda path: [str(path)],
        )

    return registry


def _path(text: str) -> Path:
    if not text:
        raise ValueError("a path must not be empty")
    return Path(text)
