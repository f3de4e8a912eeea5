"""Tables of the report: what each column says of a row, and the six lines of the README."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from report_names import (
    FAMILIES,
    blocks_text,
    mega_text,
    mode_text,
    number_text,
    percent_text,
    place_text,
    ratio_text,
    run_text,
    shares_text,
    tera_text,
)
from report_rows import Row, is_plain, is_predicted

from dbkernels.memory.units import in_words

Table = list[list[str]]
MISSING = "–"


class Column(NamedTuple):
    """A heading, what a cell says of its row and of the eager row, and which number is best."""

    title: str
    text: Callable[[Row, Row | None], str]
    value: str = ""  # of the row; "" where nothing is best
    best: Callable[[set[float]], float] = min


def _number(title: str, name: str, text: Callable[[float], str], best=None) -> Column:
    """A column of one number of each row."""

    def cell(row: Row, _: Row | None) -> str:
        mark = " (predicted)" if name == "peak_allocated_bytes" and is_predicted(row) else ""
        return MISSING if row.get(name) is None else text(row[name]) + mark

    return Column(title, cell, name if best else "", best or min)


def _ratio(name: str, title: str = "of eager") -> Column:
    """A column of ratios to eager; what was measured is not divided by what is predicted."""

    def cell(row: Row, eager: Row | None) -> str:
        alike = eager and row[name] and eager[name] and is_predicted(row) == is_predicted(eager)
        return ratio_text(row[name] / eager[name]) if alike else MISSING

    return Column(title, cell)


def _category(*names: str) -> Column:
    def cell(row: Row, _: Row | None) -> str:
        sizes = row["by_category"]
        return MISSING if sizes is None else in_words(sum(sizes.get(name, 0) for name in names))

    return Column(names[0].replace("_", " "), cell)


def _shares(row: Row, _: Row | None, *, name: str) -> str:
    """Shares of 1 with their spread over seeds, where there is one."""
    if row.get(name) is None:
        return MISSING
    spreads = row.get(f"{name}_spread") or [None] * len(row[name])
    pairs = zip(row[name], spreads, strict=True)
    steps = [f"{100 * share:.1f}" + (f" ± {100 * s:.1f}" if s else "") for share, s in pairs]
    return f"{', '.join(steps)} %"


def _over_seeds(title: str, name: str, best: Callable | None = None) -> Column:
    """A column of figures, such as bits per character: of all seeds, with their spread."""

    def cell(row: Row, _: Row | None) -> str:
        if row.get(name) is None:
            return MISSING
        pairs = zip(row[name], row[f"{name}_spread"], strict=True)
        return ", ".join(f"{mean:.3f}" + (f" ± {s:.3f}" if s else "") for mean, s in pairs)

    return Column(title, cell, name if best else "", best or min)


def _bits_of_blocks(row: Row, _: Row | None) -> str:
    return ", ".join(f"{bits:.3f}" for bits in row.get("blocks", ())) or MISSING


def _of_end_to_end(row: Row, whole: Row | None) -> str:
    return ratio_text(row["frechet"][0] / whole["frechet"][0]) if whole else MISSING


def _spread(row: Row, _: Row | None) -> str:
    low, high = row.get("p20_ms"), row.get("p80_ms")
    return MISSING if low is None else f"{number_text(low)} to {number_text(high)}"


def _share_of_copies(row: Row, _: Row | None) -> str:
    rate = row.get("same_size_copy_gbps") or row.get("copy_gbps")
    return ratio_text(row["achieved_gbps"] / rate) if rate else MISSING


def _peak_of_way(row: Row, _: Row | None) -> str:
    """Bytes, or that a trainer refuses the way."""
    return "refused" if row["refused"] else in_words(row["peak_allocated_bytes"])


def _saved_by_parts(row: Row, _: Row | None) -> str:
    """What a way saves, and what its parts save one by one, where it has several."""
    if row["apart"] is None:
        return MISSING if row["saved"] is None else in_words(row["saved"])
    return f"{in_words(row['saved'])} ({in_words(row['apart'])})"


def _launches(row: Row, _: Row | None) -> str:
    forward = row.get("launches_forward")
    return MISSING if forward is None else f"{forward} + {row['launches_backward']}"


SPREAD = Column("p20 to p80", _spread)
WAY = Column("way", lambda row, _: run_text(row))
PEAK = (
    Column("blocks", lambda row, _: str(row["num_blocks"])),
    WAY,
    Column("on the device", lambda row, _: place_text(row)),
    _number("peak", "peak_allocated_bytes", in_words, min),
    _ratio("peak_allocated_bytes"),
)
STEP = _number("step, ms", "step_ms", number_text, min)
SWEEP = (_number("sweep, ms", "sweep_ms", number_text, min), _ratio("sweep_ms"))
MEDIAN = (_number("ms", "median_ms", number_text, min), SPREAD, _ratio("median_ms"))
COLUMNS = {
    "demo": (
        Column("model", lambda row, _: FAMILIES[row["family"]]),
        Column("trained", lambda row, _: blocks_text(row["num_blocks"])),
        _number("bits per character", "bits", "{:.3f}".format, min),
        Column("bits of each block", _bits_of_blocks),
        Column("accuracy after each step", partial(_shares, name="accuracy")),
        Column("the same from noise", partial(_shares, name="accuracy_from_noise")),
        _number("cross-entropy at the most noise", "cross_entropy", number_text, min),
        _number("Fréchet distance", "frechet", number_text, min),
        _number("recognised as asked", "recognised", lambda share: shares_text([share]), max),
        _number("peak", "peak_bytes", in_words, min),
        _ratio("peak_bytes", "of end to end"),
        _number("saved", "saved_bytes", in_words, min),
        _ratio("saved_bytes", "of end to end"),
        STEP,
        SWEEP[0],
        _ratio("sweep_ms", "of end to end"),
        _number("training, s", "training_s", number_text),
    ),
    "answers": (
        Column("trained", lambda row, _: blocks_text(row["num_blocks"])),
        _number("least level", "least", "{:g}".format),
        Column("after each step from z = 0", partial(_shares, name="accuracy")),
        Column("from noise", partial(_shares, name="accuracy_from_noise")),
        Column("mean of six starts", partial(_shares, name="accuracy_of_six")),
    ),
    "text": (
        Column("family", lambda row, _: FAMILIES[row["family"]]),
        Column("trained", lambda row, _: row["competitor"]),
        Column("layers", lambda row, _: str(row["depth"])),
        _over_seeds("bits", "bits"),
        _over_seeds("down to the least level", "least"),
        _over_seeds("at the most noise", "most_noise"),
        _over_seeds("of the sampler", "sampler"),
        _over_seeds("of each block", "blocks"),
    ),
    "noise": (
        Column("noise", lambda row, _: row["process"]),
        Column("predicted", lambda row, _: row["prediction"]),
        Column("trained", lambda row, _: blocks_text(row["num_blocks"])),
        Column("overlap", lambda row, _: f"{row['gamma']:g}" if row["num_blocks"] > 1 else MISSING),
        _over_seeds("Fréchet distance", "frechet"),
        Column("of end to end", _of_end_to_end),
        Column("recognised as asked", partial(_shares, name="recognised")),
    ),
    "conversion": (
        Column("family", lambda row, _: FAMILIES[row["family"]]),
        Column("trained", lambda row, _: row["competitor"]),
        Column("seeds", lambda row, _: str(row["seeds"])),
        _over_seeds("bits", "bits"),
        _over_seeds("at the most noise", "most_noise"),
        _over_seeds("down to the least level", "least"),
        _over_seeds("as an ordinary network", "ordinary"),
        _over_seeds("Fréchet distance", "frechet"),
        Column("recognised as asked", partial(_shares, name="recognised")),
    ),
    "training": (
        *PEAK,
        _number("reserved", "peak_reserved_bytes", in_words),
        _number("saved", "saved_bytes", in_words),
        STEP,
        SPREAD,
        *SWEEP,
        _number("samples/s", "samples_per_second", number_text, max),
        _number("of matmul rate", "share_of_matmul_rate", percent_text, max),
    ),
    "cost": (
        Column("trained", lambda row, _: mode_text(row)),
        _number("layers, MFLOP", "layers_flops", mega_text),
        _number("head, MFLOP", "head_flops", mega_text),
        _number("a sweep, MFLOP", "sweep_flops", mega_text),
        _ratio("sweep_flops", "of end to end"),
        _number("kept by a step, dim", "kept_units", number_text),
        _ratio("kept_units", "of end to end"),
    ),
    "loading": (
        Column("workers", lambda row, _: str(row["workers"])),
        _number("step, ms", "step_ms", number_text, min),
        _number("waits, ms", "wait_ms", number_text),
        _number("of the step", "share", percent_text, min),
        _number("samples/s", "samples_per_second", number_text, max),
    ),
    "composition": (
        Column("way", lambda row, _: row["way"]),
        Column("blocks", lambda row, _: str(row["num_blocks"])),
        Column("peak", _peak_of_way),
        *(_category(name) for name in ("parameters", "optimizer", "gradients")),
        _category("saved_activations"),
        _category("temporaries", "workspaces", "inputs"),
        _number("of alone", "ratio", ratio_text),
        _number("product of parts", "product", ratio_text),
        Column("saves (its parts)", _saved_by_parts),
        _number("together", "verdict", str),
        _number("sent", "sent_bytes", in_words),
        _number("to and from the host", "host_bytes", in_words),
        _number("a step, TFLOP", "flops", tera_text),
        _number("a sweep, TFLOP", "sweep_flops", tera_text),
        _number("step, ms", "step_ms", number_text),
    ),
    "checkpoints": (
        Column("saved by", lambda row, _: row["impl"]),
        _number("steps stand still, ms", "stall_ms", number_text, min),
        _number("and are slower by, ms", "slowed_ms", number_text),
        _number("durable after, ms", "durable_ms", number_text, min),
        _number("on disk", "disk_bytes", in_words),
        _number("flips noticed", "noticed", str),
        _number("of", "flips", str),
    ),
    "timeline": (
        *PEAK,
        *(
            _category(name)
            for name in ("parameters", "optimizer", "saved_activations", "gradients")
        ),
        _category("temporaries", "workspaces"),
        Column("op at the peak", lambda row, _: row["at"]),
    ),
    "layer": (
        WAY,
        _number("saved, dim per token", "saved_units", "{:.2f}".format, min),
        _number("peak", "peak_bytes", in_words, min),
        _ratio("peak_bytes"),
        *MEDIAN,
        _number("TFLOP/s", "achieved_tflops", "{:.3g}".format, max),
        Column("launches", _launches),
    ),
    "ops": (
        Column("op", lambda row, _: f"{row['op']} {row['direction']}"),
        WAY,
        *MEDIAN,
        _number("bytes to move", "bytes_moved", in_words),
        _number("GB/s", "achieved_gbps", "{:.3g}".format, max),
        Column("of copies", _share_of_copies),
        _number("allocates", "allocated_bytes", in_words, min),
    ),
}
RIVALS = {
    "demo": ("family",),
    "noise": ("process", "prediction"),
    "training": ("num_blocks",),
    "ops": ("op", "direction"),
}


def _is_eager(row: Row) -> bool:
    """Whether a row is what ratios are to."""
    if "method" in row:
        return row["method"] == "end_to_end" and (row["suite"] == "cost" or is_plain(row))
    return row["impl"] == "eager" if "impl" in row else row["num_blocks"] == 1


def table_of(rows: Sequence[Row]) -> Table:
    """Lay out the rows of a table; columns that say nothing of any row are left out.

    Args:
        rows:  of `report_rows.tables`
    Returns:
        the headings, then a line for each row; the best number of each group of rivals is bold.
    """
    suite = rows[0]["suite"]
    lines, columns, groups = [], COLUMNS[suite], {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in RIVALS.get(suite, ())), []).append(row)
    for rivals in groups.values():
        # blocks are compared with end to end, which is another group
        base = next(filter(_is_eager, rows if "method" in rows[0] else rivals), None)
        lines += [[_cell(column, row, base, rivals) for column in columns] for row in rivals]
    told = [any(line[k] != MISSING for line in lines) for k in range(len(columns))]
    lines.insert(0, [column.title for column in columns])
    return [[cell for cell, tells in zip(line, told, strict=True) if tells] for line in lines]


def _cell(column: Column, row: Row, base: Row | None, rivals: Sequence[Row]) -> str:
    text = column.text(row, base)
    values = {rival.get(column.value) for rival in rivals} - {None}
    is_best = len(values) > 1 and row.get(column.value) == column.best(values)
    return f"**{text}**" if is_best else text


QKV = {"recompute": "qkv", "offload": "none"}
CIFAR, DIGITS = ({"family": "vit", "preset": name} for name in ("cifar100", "digits"))
FIGURES = (  # a title, a name, how it is written, the case, and the way in 3 blocks
    ("Peak memory, DiT-XL/2, batch 128", "peak_allocated_bytes", in_words,
     {"preset": "XL/2", "batch": 128}, {"recompute": "layer", "offload": "cpu"}),
    ("Peak memory, ViT cifar100, batch 64", "peak_allocated_bytes", in_words, CIFAR, QKV),
    ("Time of a sweep in ms, ViT cifar100", "sweep_ms", number_text, CIFAR, QKV),
    ("Time of a sweep in ms, ViT digits", "sweep_ms", number_text, DIGITS, QKV),
    ("Accuracy on unseen digits, ViT", "final_accuracy", lambda share: shares_text([share]),
     DIGITS | {"suite": "demo"}, {}),
    ("Fréchet distance of generated digits, DiT", "frechet", number_text,
     {"suite": "demo", "family": "dit"}, {}),
)  # fmt: skip


def headline(rows: Sequence[Row]) -> tuple[Table, str]:
    """The six figures of the README, each with its device and the command that printed it.

    Args:
        rows:  of all suites; the last one of a kind counts
    Returns:
        the table, whose last column has a letter for each command, and what the letters mean.
    """
    commands: dict[str, str] = {}
    lines = [["figure", "end to end", "checkpointed", "3 blocks", "device", "printed by"]]
    for title, name, text, case, way in FIGURES:
        ends = ({"num_blocks": 1}, {"method": "checkpointed"}, {"num_blocks": 3} | way)
        case = {"suite": "training"} | case
        same = [row for row in rows if _has(row, case) and not row.get("optimizer_in_backward")]
        found = [[row for row in same if _has(row, end)] for end in ends]
        found[0] = list(filter(_is_eager, found[0]))
        if found[0] and found[2]:
            row = found[2][-1]
            letter = commands.setdefault(row["command"], "ABCDEF"[len(commands)])
            cells = [text(each[-1][name]) if each else MISSING for each in found]
            where = f"{row['device']}{', predicted' if is_predicted(row) else ''}"
            lines.append([title, *cells, where, letter])
    return lines, "; ".join(f"{letter}: `{command}`" for command, letter in commands.items())


def _has(row: Row, wanted: Row) -> bool:
    return all(row.get(name) == value for name, value in wanted.items())
