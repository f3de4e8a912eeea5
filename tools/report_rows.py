"""Rows of benchmarks: read from JSON lines, checked, and sorted into tables.

A *case* is what ran, such as a model and its batch. A *way* is how it ran, such as a method and its
number of blocks. A *setting* is where it ran, from the device to the commit. One table holds one
case in one setting, and each of its lines is a way.
"""

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Row = dict[str, object]

BLOCKWISE = ("block_stock", "block_fused")
METHODS = ("end_to_end", "compiled", "checkpointed", "selective", *BLOCKWISE)
POLICIES = ("none", "attention", "mlp", "qkv", "layer", "layer_narrow")
SETTING = "device driver threads torch triton commit"
MODEL = "family preset batch dtype"
TRAINED = "method num_blocks recompute budget offload optimizer_in_backward launch implementation"
SUITES = {  # names that the rows of a benchmark have: of the case, of the way, and others
    "demo": ("preset", "family num_blocks", "updates loss peak_bytes saved_bytes sweep_ms"),
    "answers": (
        "data batch updates",
        "num_blocks least",
        "seeds accuracy accuracy_from_noise accuracy_of_six",
    ),
    "text": ("data batch updates", "family competitor num_blocks depth", "seeds bits blocks"),
    "noise": (
        "data batch updates sampler",
        "process prediction num_blocks gamma",
        "seeds frechet recognised",
    ),
    "conversion": (
        "data batch updates source_updates",
        "family competitor num_blocks",
        "seeds",
    ),
    "study": (
        "study scale family data",
        "arm seed",
        "updates batch num_blocks layers train config",
    ),
    "training": (MODEL, TRAINED, "peak_allocated_bytes saved_bytes memory step_ms sweep_ms"),
    "cost": (
        f"{MODEL} words",
        "method num_blocks mode",
        "layers_flops head_flops sweep_flops kept_units",
    ),
    "loading": (MODEL, "num_blocks workers", "step_ms wait_ms share samples_per_second"),
    "composition": (
        MODEL,
        "num_blocks way",
        "peak_allocated_bytes by_category sent_bytes host_bytes flops sweep_flops ratio saved"
        " product apart verdict refused memory",
    ),
    "checkpoints": (
        "processes state_bytes product",
        "impl",
        "disk_bytes stall_ms slowed_ms durable_ms flips noticed",
    ),
    "timeline": (MODEL, TRAINED, "peak_allocated_bytes by_category at starts phases levels"),
    "layer": (
        "B T dim num_heads hidden dtype",
        "impl recompute budget implementation",
        "saved_units peak_bytes median_ms p20_ms p80_ms achieved_tflops",
    ),
    "ops": (
        "shape dtype",
        "op direction impl implementation",
        "median_ms p20_ms p80_ms bytes_moved achieved_gbps allocated_bytes",
    ),
}
CHOICES = {
    "method": METHODS,
    "recompute": (*POLICIES, None),
    "offload": ("none", "cpu"),
    "optimizer_in_backward": (False, True),
    "launch": ("ops", "graph"),  # op by op, or a step as one CUDA graph
    "memory": ("measured", "predicted"),
    "scale": ("tiny", "small", "paper"),  # of a study
}
UNITS = ("_ms", "_bytes", "_gbps", "_tflops")  # endings of names whose values are numbers


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
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} must be a file of JSON lines, got {error}") from None
    yield from parsed(text, _row, file)


def parsed(text: str, parse: Callable[[str], Row], file: Path) -> Iterator[Row]:
    """The rows of the lines of a text, but for empty lines.

    Args:
        text:   of a file
        parse:  makes a row of a line
        file:   for the message
    Raises:
        ValueError: `parse` did; names the file and the line.
    """
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield parse(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: {error}") from None


def object_of(line: str) -> Row:
    """The object of a line of JSON.

    Raises:
        ValueError: the line is none.
    """
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"a line must be one JSON object, got {line[:40]!r}")
    return row


def suite_of(row: Row) -> object:
    """What a row names as its suite; rows of the ops and of a layer name none."""
    return row.get("suite") or ("ops" if "op" in row else "layer" if "saved_units" in row else None)


def _row(line: str) -> Row:
    row = object_of(line)
    name = suite_of(row)
    if not isinstance(name, str) or name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    needed = " ".join((*SUITES[name], SETTING, "command")).split()
    missing = [key for key in needed if key not in row]
    if missing:
        raise ValueError(f"a row of {name} must have {', '.join(missing)}, which it lacks")
    for key, value in row.items():
        _check(key, value)
    if name == "study":
        _check_study(row)
    return row | {"suite": name}


def _check_study(row: Row) -> None:
    """Refuse a row of a study that no table can show: its figures are numbers, or lists of them."""
    kinds = dict.fromkeys(("study", "family", "data", "arm", "train", "command"), str)
    kinds |= {"seed": int, "updates": int, "layers": list, "config": dict, "sweeps": dict}
    kinds |= {"baseline": list}
    named = {*kinds, *CHOICES, *SETTING.split(), "suite", "data_digest", "memory"}
    for key, value in row.items():
        if key in kinds and not isinstance(value, kinds[key]):
            raise ValueError(f"{key} must be of the kind {kinds[key].__name__}, got {value!r:.40}")
        if key in named - {"layers"}:
            continue
        numbers = value if isinstance(value, list) else [value]
        if not numbers or not all(type(each) in (int, float) for each in numbers):
            raise ValueError(f"{key} must be a number, or a list of some, got {value!r:.40}")


def _check(name: str, value: object) -> None:
    if name in CHOICES and value not in CHOICES[name]:
        known = ", ".join(map(str, CHOICES[name]))
        raise ValueError(f"{name} must be one of {known}, got {value!r}")
    if name.endswith(UNITS) and value is not None:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not (is_number and 0 <= value < math.inf):
            raise ValueError(f"{name} must be a finite number from 0 on, got {value!r:.40}")


def is_predicted(row: Row) -> bool:
    """Whether a row's bytes were computed and nothing ran."""
    return row.get("memory") == "predicted"


def is_plain(row: Row) -> bool:
    """Whether a step updates after its backward and launches op by op, as eager torch does."""
    return not row["optimizer_in_backward"] and row["launch"] == "ops"


def tables(rows: Sequence[Row], suite: str) -> list[list[Row]]:
    """Sort the rows of a suite into tables: the newest setting of each case on each device.

    Models of text with other vocabularies, and layers of other kinds, are other cases.

    Args:
        rows:   of all suites
        suite:  one of SUITES
    Returns:
        Tables in the order of their cases' first row. A row that was measured again replaces the
        earlier one, and a measured one replaces a predicted one.
    """
    case, way, _ = SUITES[suite]
    found: dict[tuple, dict[tuple, dict[tuple, Row]]] = {}
    for row in (row for row in rows if row["suite"] == suite):
        named = row.get("words"), row.get("layer"), *_key(row, f"{case} device")
        settings = found.setdefault(named, {})
        # the newest setting goes to the end; two commands may each print a part of a table, and a
        # study goes on for days, while commits and packages come
        setting = () if suite == "study" else _key(row, SETTING)
        table = settings[setting] = settings.pop(setting, {})
        older = table.get(_key(row, way))
        if older is None or is_predicted(older) or not is_predicted(row):
            table[_key(row, way)] = row
    newest = (list(settings.values())[-1].values() for settings in found.values())
    return [sorted(table, key=_order) for table in newest]


def _key(row: Row, names: str) -> tuple[str, ...]:
    return tuple(json.dumps(row[name]) for name in names.split())


def _order(row: Row) -> tuple:
    """Methods and policies from most memory to least; ops and layers stay as they were printed."""
    if row["suite"] != "training":
        return ()
    recompute = POLICIES.index(row["recompute"]) if row["recompute"] else -1
    budget = -1.0 if row["budget"] is None else row["budget"]
    method, saves = METHODS.index(row["method"]), not is_plain(row)
    return row["num_blocks"], method, recompute, row["offload"] != "none", -budget, saves
