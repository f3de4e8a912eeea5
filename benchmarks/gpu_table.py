"""What a run of `tools/gpu.sh` found, in at most 60 lines, from the rows that it left.

`python benchmarks/gpu_table.py FOLDER`; standard input has a line for each job that ran.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

Row = dict[str, object]

LINES = 60
FAILURES = 8  # of tests that are named here; the file of the tests has all
GIB = 2**30


def table(folder: Path, ran: Sequence[str]) -> list[str]:
    """The lines of the table.

    Args:
        folder:  of the results
        ran:     a line for each job
    Returns:
        At most LINES of them.
    """
    training, ops = rows(folder / "headline.jsonl"), rows(folder / "kernels.jsonl")
    lines = [*ran, *_tests(folder / "tests.txt")]
    every = [*training, *ops]
    # a row that was not timed yet knows no ceilings
    for some in [row for row in every if row.get("copy_gbps")][:1] or every[:1]:
        lines.append(f"{some['device']}, commit {some['commit'] or 'unknown'}, {_ceilings(some)}")
    lines += _training(training) + _training(rows(folder / "graphs.jsonl")) + _ops(ops)
    if len(lines) > LINES:
        lines[LINES - 1 :] = [f"{len(lines) - LINES + 1} more lines are in {folder}"]
    return lines


def rows(path: Path) -> list[Row]:
    """The rows of a file; of one that was cut off, those that are whole."""
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


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


def _training(found: Sequence[Row]) -> list[str]:
    """A line for each way, with the presets beside each other."""
    presets = list(dict.fromkeys(str(row["preset"]) for row in found))
    lines = {}
    for row in found:  # one that is timed replaces the earlier one of its memory
        lines.setdefault(_way(row), {})[row["preset"]] = row
    if not lines:
        return []
    titles = (f"{name}: GiB, predicted, reserved, sweep ms, rate" for name in presets)
    heading = " | ".join(["way, blocks".ljust(34), *(title.ljust(42) for title in titles)])
    texts = [
        " | ".join([way.ljust(34), *(_figures(of.get(name)).ljust(42) for name in presets)])
        for way, of in lines.items()
    ]
    return [heading, *texts]


def _way(row: Row) -> str:
    budget = None if row["budget"] is None else f"budget {row['budget']:g}"
    one = "offload cpu" if row["offload"] == "cpu" else None
    graph = "graph" if row["launch"] == "graph" else None
    words = (row["method"].removeprefix("block_"), row["recompute"], budget, one, graph)
    return f"{' '.join(str(word) for word in words if word)}, {row['num_blocks']}"


def _figures(row: Row | None) -> str:
    if row is None:
        return "–"
    names = ("peak_allocated_bytes", "predicted_peak_allocated_bytes", "peak_reserved_bytes")
    sizes = ("–" if row.get(name) is None else f"{row[name] / GIB:.2f}" for name in names)
    sweep, share = row["sweep_ms"], row["share_of_matmul_rate"]
    sweep = "–" if sweep is None else f"{sweep:.1f}"
    predicted = "(predicted) " if row["memory"] == "predicted" else ""
    swap = "" if row.get("swap_ms") is None else f" swap {row['swap_ms']:.0f} ms"
    share = "–" if share is None else f"{100 * share:.0f} %"
    return f"{predicted}{' '.join(sizes)} {sweep} {share}{swap}"


def _ops(found: Sequence[Row]) -> list[str]:
    """A line for each op, direction and stream of the fused ones, with the sizes beside each other.

    An op that has one size has a line for it."""
    fused = [row for row in found if row["impl"] == "fused"]
    lines: dict[str, list[str]] = {}
    for row in fused:
        stream = ", f32 stream" if "stream" in row["dtype"] else ""
        size = row["shape"][-1] if len(row["shape"]) == 3 else "x".join(map(str, row["shape"]))
        figures = f"{size}: {1e3 * row['median_ms']:.1f} {100 * row['share_of_copy']:.0f} %"
        name = f"{row['op']} {row['direction']}{stream}"
        lines.setdefault(name, []).append(figures.ljust(18))
    heading = ["op: width: µs, share of copies of as many bytes"] if lines else []
    return heading + [f"{name.ljust(34)} {' '.join(each)}" for name, each in lines.items()]


if __name__ == "__main__":
    print(*table(Path(sys.argv[1]), sys.stdin.read().splitlines()), sep="\n")
