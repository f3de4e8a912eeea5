"""Results of benchmarks as one page of HTML, or as the tables of the README.

python tools/report.py benchmarks/results --out runs/bench/report.html
python tools/report.py --readme benchmarks/results
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from page import write_whole
from report_page import page
from report_readme import rewritten
from report_rows import read

README = Path(__file__).parents[1] / "README.md"
OUT = Path("runs/bench/report.html")


def main(arguments: Sequence[str]) -> int:
    """Run the command line.

    Args:
        arguments:  after the program's name
    Returns:
        exit status: 1 where something is wrong, which a sentence on stderr names.
    """
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("results", nargs="+", type=Path, help="files or folders of *.jsonl")
    parser.add_argument("--out", type=Path, help=f"the page; {OUT} unless given")
    parser.add_argument("--readme", action="store_true", help="rewrite the README's tables instead")
    options = parser.parse_args(arguments)
    if options.readme and options.out:
        parser.error("--readme writes README.md, so it takes no --out")
    try:
        rows = read(options.results)
        path = README if options.readme else options.out or OUT
        text = rewritten(path.read_text(encoding="utf-8"), rows) if options.readme else page(rows)
        write_whole(path, text)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{path} must be a file that can be written, got {error}", file=sys.stderr)
        return 1
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
