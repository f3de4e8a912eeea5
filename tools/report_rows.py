"""Rows of benchmarks: read from JSON lines, checked, and sorted into tables.

A *case* is what was run, such as a model and its batch; a *way* is how, such as a method and its
number of blocks; a *setting* is where, from the device to the commit. One table is one case in one
setting, and its lines are ways.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from report_check import DRAWN, check_levels, is_positive

Row = dict[str, object]

TRAINED = ("training", "timeline")  # suites whose cases and ways are those of training
METHODS = (
    "end_to_end",
    "compiled",
    "checkpointed",
    "selective",
    "block_stock",
    "block_fused",
)
POLICIES = ("none", "attention", "mlp", "qkv", "layer", "layer_narrow")
# what a row of an older program, which knew nothing else, does not say
OLDER = {"optimizer_in_backward": False, "launch": "ops"}
TRAINED_WAY = ("method", "num_blocks", "recompute", "budget", "offload", *OLDER)
SETTING = ("device", "driver", "threads", "torch", "triton", "commit")


@dataclass(frozen=True)
class Suite:
    """What the rows of one benchmark have."""

    case: tuple[str, ...]
    way: tuple[str, ...]
    needs: tuple[str, ...]  # beside case, way and setting
    ms: str | None  # what a way is compared by across settings; None where it never is
    peak: str | None  # bytes, likewise
    program: str  # that printed a row which does not say so itself


SUITES = {
    "training": Suite(
        ("family", "preset", "batch", "dtype"),
        TRAINED_WAY,
        ("step_ms", "sweep_ms", "peak_allocated_bytes", "memory", "command"),
        "sweep_ms",
        "peak_allocated_bytes",
        "python benchmarks/training.py",
    ),
    "timeline": Suite(
        ("family", "preset", "batch", "dtype"),
        TRAINED_WAY,
        ("peak_allocated_bytes", "memory", "by_category", "at", *DRAWN, "command"),
        None,
        "peak_allocated_bytes",
        "python benchmarks/timeline.py",
    ),
    "layer": Suite(
        ("B", "T", "dim", "num_heads", "hidden", "dtype"),
        ("impl", "recompute", "budget"),
        ("median_ms", "p20_ms", "p80_ms", "peak_bytes", "saved_units", "achieved_tflops"),
        "median_ms",
        "peak_bytes",
        "python benchmarks/layer.py",
    ),
    "ops": Suite(
        ("shape", "dtype"),
        ("op", "direction", "impl"),
        ("median_ms", "p20_ms", "p80_ms", "bytes_moved", "achieved_gbps", "allocated_bytes"),
        "median_ms",
        None,
        "python benchmarks/ops.py",
    ),
}
CHOICES = {
    "method": METHODS,
    "recompute": (*POLICIES, None),
    "offload": ("none", "cpu"),
    "optimizer_in_backward": (False, True),
    "launch": ("ops", "graph"),  # one by one, or a step as one CUDA graph
    "memory": ("measured", "predicted"),
}
POSITIVE = (
    "step_ms", "sweep_ms", "p20_ms", "p80_ms", "median_ms", "samples_per_second", "num_blocks",
    "peak_allocated_bytes", "peak_reserved_bytes", "peak_bytes", "bytes_moved", "achieved_gbps",
    "achieved_tflops", "share_of_matmul_rate", "copy_gbps", "matmul_tflops", "budget",
    "saved_units", "allocated_bytes", "same_size_copy_gbps", "share_of_copy", "swap_ms",
    "predicted_peak_allocated_bytes", "predicted_peak_reserved_bytes",
)  # fmt: skip
ZERO = ("budget", "allocated_bytes")  # of activation memory, and of an op that allocates nothing
NULL = ("step_ms", "sweep_ms")  # of a row that is predicted


def read(paths: Sequence[Path]) -> list[Row]:
    """Read every row of every *.jsonl under the paths.

    Args:
        paths:  files, or folders that are searched to the bottom
    Returns:
        the rows in the order of the files' names and lines, each with its suite.
    Raises:
        ValueError: a path holds no row, or a line is not a row; names the file and the line.
    """
    rows = []
    for path in paths:
        files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
        found = [row for file in files for row in _rows(file)]
        if not found:
            raise ValueError(f"{path} must hold results as *.jsonl, got none")
        rows += found
    return rows


def _rows(file: Path) -> Iterator[Row]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be a file of JSON lines, got {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield _row(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None


def _row(line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"a line must be one JSON object, got {line[:40]!r}")
    suite_name = row.get("suite") or _suite_of(row)
    if not isinstance(suite_name, str) or suite_name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {suite_name!r}")
    suite = SUITES[suite_name]
    row = (OLDER if suite_name in TRAINED else {}) | row
    missing = [key for key in (*suite.case, *suite.way, *suite.needs, *SETTING) if key not in row]
    if missing:
        raise ValueError(f"a row of {suite_name} must have {', '.join(missing)}, which it lacks")
    for name in suite.needs:
        if row[name] is None and name not in NULL:
            raise ValueError(f"{name} must be a number, got null")
    row |= {"suite": suite_name}
    _check(row)
    return {"command": suite.program} | row


def _suite_of(row: Row) -> str | None:
    """What a row of an older program is, which does not say so."""
    return "ops" if "op" in row else "layer" if "saved_units" in row else None


def _check(row: Row) -> None:
    for name, value in row.items():
        if name in CHOICES and value not in CHOICES[name]:
            known = ", ".join(str(choice) for choice in CHOICES[name])
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
        if name in POSITIVE and value is not None and not is_positive(value, name in ZERO):
            raise ValueError(f"{name} must be a positive number, got {value!r:.40}")
    if "num_blocks" in row and not isinstance(row["num_blocks"], int):
        raise ValueError(f"num_blocks must be an integer, got {row['num_blocks']!r}")
    if not isinstance(row.get("shape", []), list):
        raise ValueError(f"shape must be a list of sizes, got {row['shape']!r}")
    parts = row.get("by_category") or {}
    if not isinstance(parts, dict) or not all(is_positive(size, True) for size in parts.values()):
        raise ValueError(f"by_category must be bytes by name, got {parts!r}")
    if row["suite"] == "timeline":
        check_levels(row)


def key(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """Values of a row that tell it from others.

    Args:
        row:    of any suite
        names:  such as a suite's case
    Returns:
        each value as JSON, so that a list can be a key too.
    """
    return tuple(json.dumps(row[name]) for name in names)


def tables(rows: Sequence[Row], suite: str) -> list[list[Row]]:
    """Sort the rows of a suite into tables.

    Args:
        rows:   of all suites
        suite:  one of SUITES
    Returns:
        Tables in the order of their last row, the newest setting of a case last. A row that was
        measured again replaces the earlier one, and a measured one replaces a predicted one.
    """
    of = SUITES[suite]
    groups: dict[tuple, dict[tuple, Row]] = {}
    for row in (row for row in rows if row["suite"] == suite):
        place = key(row, (*of.case, *SETTING))
        # the newest goes to the end
        group = groups[place] = groups.pop(place, {})
        way = (*key(row, of.way), row.get("implementation"))
        older = group.get(way)
        if older is None or not (is_predicted(row) and not is_predicted(older)):
            group[way] = row
    return [sorted(group.values(), key=_order) for group in groups.values()]


def is_predicted(row: Row) -> bool:
    """Whether nothing has run to give a row's bytes.

    Args:
        row:  of any suite
    Returns:
        False for a measured row, and where the suite never predicts.
    """
    return row.get("memory") == "predicted"


def is_plain(row: Row) -> bool:
    """Whether a step updates after its backward and launches op by op, as eager torch does.

    Args:
        row:  of training or timeline
    Returns:
        False where it saves either.
    """
    return all(row[name] == usual for name, usual in OLDER.items())


def newest(groups: Sequence[list[Row]], suite: str) -> list[tuple[list[Row], list[list[Row]]]]:
    """Pair the newest table of each case and device with the older ones.

    Args:
        groups:  of `tables`
        suite:   theirs
    Returns:
        (newest, older) by device, in the order of the cases' first table.
    """
    same: dict[tuple, list[list[Row]]] = {}
    for group in groups:
        same.setdefault(key(group[0], ("device", *SUITES[suite].case)), []).append(group)
    return [(found[-1], found[-2::-1]) for found in same.values()]


def _order(row: Row) -> tuple:
    """Methods and policies from most memory to least; ops and layers stay as printed."""
    if row["suite"] != "training":
        return ()
    recompute = POLICIES.index(row["recompute"]) if row["recompute"] else -1
    budget = -1.0 if row["budget"] is None else row["budget"]
    method, plain = METHODS.index(row["method"]), is_plain(row)
    return row["num_blocks"], method, recompute, row["offload"] != "none", -budget, not plain
