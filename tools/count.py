"""Lines of code, and how many files one training step crosses.

    python tools/count.py [--json]

    package            code lines under dbkernels
    tools_benchmarks   code lines under tools and benchmarks
    tests              code lines under tests
    longest_file       name and lines, all of them, of the longest file outside tests
    step_files         files of the package with a function that one step of a tiny DiT on a CPU
                       runs, after a step that warms up

Only Python is counted: shell, C++, CUDA, JSON and CSS are in no total. A code line holds a token
that is neither a comment nor part of a string that stands alone, such as a docstring of a function
or of a field.
"""

import argparse
import ast
import io
import json
import sys
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "dbkernels"
TOTALS = {"package": [PACKAGE], "tools_benchmarks": ["tools", "benchmarks"], "tests": ["tests"]}
NO_CODE = {"COMMENT", "NL", "NEWLINE", "INDENT", "DEDENT", "ENDMARKER"}  # kinds of tokens


def code_lines(source: str) -> int:
    """Lines of a Python source that hold code."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if tokenize.tok_name[token.type] not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - set(docstring_lines(source)))


def docstring_lines(source: str) -> Iterator[int]:
    """Lines of all statements that are a string alone: docstrings, those of fields too."""
    for node in ast.walk(ast.parse(source)):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str):
            yield from range(node.lineno, node.end_lineno + 1)


def sources(root: Path, *folders: str) -> list[Path]:
    """Python files under some folders, in a fixed order."""
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def count(root: Path) -> dict[str, int | list[str | int]]:
    """All but the files of a step; `longest_file` is [name, lines]."""
    counts = {
        key: sum(code_lines(path.read_text()) for path in sources(root, *folders))
        for key, folders in TOTALS.items()
    }
    outside = sources(root, PACKAGE, "tools", "benchmarks") + sorted(root.glob("*.py"))
    lines = {str(path.relative_to(root)): len(path.read_text().splitlines()) for path in outside}
    return counts | {"longest_file": list(max(lines.items(), key=lambda item: item[1]))}


def files_run(function: Callable[[], object], folder: Path) -> set[Path]:
    """Files under a folder of which a function runs while `function` does."""
    files, before = set(), sys.getprofile()
    sys.setprofile(lambda frame, event, arg: files.add(frame.f_code.co_filename))
    try:
        function()
    finally:
        sys.setprofile(before)
    return {path for path in map(Path, files) if folder in path.parents}


def make_step() -> Callable[[], object]:
    """A training step of a tiny DiT, every setting the default but for its sizes."""
    # what counts lines alone needs neither torch nor a package that works
    from dbkernels import DiffusionBlocks, DiT, Trainer, open_data

    model = DiT(DiT.preset("digits").resized({"dim": 16, "depth": 3, "num_heads": 2}))
    trainer = Trainer(DiffusionBlocks(model), open_data("digits"), steps=2, batch_size=4)
    return lambda: trainer.step_block(trainer.next_block())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one object of JSON")
    as_json = parser.parse_args().json
    sys.path.insert(0, str(ROOT))
    step = make_step()
    step()
    counts = count(ROOT) | {"step_files": len(files_run(step, ROOT / PACKAGE))}
    lines = [f"{name:18}{value}" for name, value in counts.items()]
    print(json.dumps(counts) if as_json else "\n".join(lines))


if __name__ == "__main__":
    main()
