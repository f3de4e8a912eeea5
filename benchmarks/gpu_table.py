"""What a run of `tools/gpu.sh` found, in at most 60 lines, from the rows that it left.

`python benchmarks/gpu_table.py FOLDER`; standard input has a line for each job that ran.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from program import read
from show import Row, cut_text

LINES = 60
FAILURES = 8  # of tests that are named here; the file of the tests has all
MISSING = "–"
GIB = 2**30
SIZES = ("peak_allocated_bytes", "predicted_peak_allocated_bytes", "peak_reserved_bytes")


def table(folder: Path, ran: Sequence[str]) -> list[str]:
    """The lines of the table.

    Args:
        folder:  of the results; a file may be missing, or cut off in its last line
        ran:     a line for each job
    Returns:
        At most LINES of them.
    """
    paths = [folder / f"{name}.jsonl" for name in ("headline", "text", "kernels", "graphs")]
    training, text, ops, graphs = (read(path) if path.exists() else [] for path in paths)
    lines = [*ran, *_tests(folder / "tests.txt")]
    every = [*training, *text, *ops]
    # a row that was not timed yet knows no ceilings
    for row in [row for row in every if row.get("copy_gbps")][:1] or every[:1]:
        lines.append(f"{row['device']}, commit {row['commit'] or 'unknown'}, {_ceilings(row)}")
    lines += [*_training(training), *_training(text), *_training(graphs), *_ops(ops)]
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"{len(lines) - LINES + 1} more lines are in {folder}"]
    return lines


def _ceilings(row: Row) -> str:
    if row.get("copy_gbps") is None:
        return "not timed"
    return f"copies {row['copy_gbps']:.0f} GB/s, multiplies {row['matmul_tflops']:.3g} TFLOP/s"


def _tests(path: Path) -> Iterator[str]:
    if not path.exists():
        return
    text = path.read_text()
    # as pytest says it at once, in one process or in several
    names = re.findall(r"(?:FAILED|ERROR) +(tests/\S+)|(tests/\S+) (?:FAILED|ERROR)", text)
    names = list(dict.fromkeys(first or second for first, second in names))
    last = [line.strip("= ") for line in text.splitlines() if line.strip()][-1:]
    yield f"tests: {len(names)} failed; {''.join(last)}"
    yield from (f"  {name}" for name in names[:FAILURES])


def _training(found: Sequence[Row]) -> Iterator[str]:
    """A line for each way, with the presets beside each other."""
    presets = list(dict.fromkeys(str(row["preset"]) for row in found))
    lines: dict[str, dict[str, Row]] = {}
    for row in found:  # one that is timed replaces the earlier one of its memory
        lines.setdefault(cut_text(row), {})[row["preset"]] = row
    titles = [f"{name}: GiB, predicted, reserved, sweep ms, rate" for name in presets]
    for way, of in ({"way": None} | lines if lines else {}).items():
        cells = [_figures(of.get(name)) for name in presets] if of else titles
        yield " | ".join([way.ljust(46), *(cell.ljust(42) for cell in cells)])


def _figures(row: Row | None) -> str:
    if row is None:
        return MISSING
    sizes = (MISSING if row.get(name) is None else f"{row[name] / GIB:.2f}" for name in SIZES)
    sweep, share = row["sweep_ms"], row["share_of_matmul_rate"]
    sweep = MISSING if sweep is None else f"{sweep:.1f}"
    predicted = "(predicted) " if row["memory"] == "predicted" else ""
    swap = "" if row.get("swap_ms") is None else f" swap {row['swap_ms']:.0f} ms"
    share = MISSING if share is None else f"{100 * share:.0f} %"
    return f"{predicted}{' '.join(sizes)} {sweep} {share}{swap}"


def _ops(found: Sequence[Row]) -> Iterator[str]:
    """A line for each op, direction and stream of the fused ones, with the sizes beside each other.

    An op that has one size has a line for it."""
    lines: dict[str, list[str]] = {}
    for row in (row for row in found if row["impl"] == "fused"):
        stream = ", f32 stream" if "stream" in row["dtype"] else ""
        size = row["shape"][-1] if len(row["shape"]) == 3 else "x".join(map(str, row["shape"]))
        figures = f"{size}: {1e3 * row['median_ms']:.1f} {100 * row['share_of_copy']:.0f} %"
        name = f"{row['op']} {row['direction']}{stream}"
        lines.setdefault(name, []).append(figures.ljust(18))
    if lines:
        yield "op: width: µs, share of copies of as many bytes"
    yield from (f"{name.ljust(34)} {' '.join(each)}" for name, each in lines.items())


if __name__ == "__main__":
    print(*table(Path(sys.argv[1]), sys.stdin.read().splitlines()), sep="\n")
