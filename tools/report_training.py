"""Tables of training: every way to train, by the number of blocks, against end to end in eager."""

from collections.abc import Sequence

from demo_drawing import bytes_text
from report_rows import POLICIES, Row, is_plain, is_predicted
from report_tables import Cell, Column, Table
from report_text import (
    LONG,
    NOTHING,
    ON_DEVICE,
    blocks_text,
    more_text,
    number_text,
    percent_text,
    ratio_text,
)

BLOCKWISE = ("block_stock", "block_fused")
PAPER_OVERHEAD = 0.071  # arXiv:2506.14202
OVERHEAD = "Noise conditioning: overhead of a sweep against the end-to-end eager step"
COLUMNS = (
    Column("method", left=True),
    Column("recompute or budget", left=True),
    Column("on the device", left=True),
    Column("peak", "min"),
    Column("of eager"),
    Column("step, ms", "min"),
    Column("sweep, ms", "min"),
    Column("of eager"),
    Column("samples/s", "max"),
    Column("of matmul rate", "max"),
)


def eager(rows: Sequence[Row]) -> Row | None:
    """Find what every ratio is to.

    Args:
        rows:  of one table
    Returns:
        the row of end to end in eager torch, or None.
    """
    return next((row for row in rows if row["method"] == "end_to_end" and is_plain(row)), None)


def training_table(rows: Sequence[Row]) -> Table:
    """Lay out ways to train, a group for each number of blocks.

    Args:
        rows:  of one table, in its order
    Returns:
        the table, its best figures marked.
    """
    base, groups = eager(rows), {}
    for row in rows:
        groups.setdefault(row["num_blocks"], []).append(_line(row, base))
    titled = tuple((_title(count), tuple(lines)) for count, lines in groups.items())
    return Table(COLUMNS, titled, "blocks").marked()


def _title(count: int) -> str:
    return "1 block, end to end" if count == 1 else blocks_text(count)


def _line(row: Row, base: Row | None) -> tuple[Cell, ...]:
    peak, sweep = row["peak_allocated_bytes"], row["sweep_ms"]
    base_peak = _comparable_peak(row, base)
    share, budget = row.get("share_of_matmul_rate"), row["budget"]
    samples = row.get("samples_per_second")
    return (
        # below its name, where a page has room
        Cell(LONG[row["method"]], f"{row.get('implementation') or ''}{more_text(row)}"),
        Cell(row["recompute"] or (NOTHING if budget is None else f"budget {budget:g}")),
        Cell(ON_DEVICE[row["offload"]]),
        Cell(bytes_text(peak), _reserved(row), peak, is_predicted(row)),
        Cell(ratio_text(peak, base_peak)),
        Cell(number_text(row["step_ms"]), _spread(row), row["step_ms"]),
        Cell(number_text(sweep), "", sweep),
        Cell(ratio_text(sweep, base and base["sweep_ms"])),
        Cell(number_text(samples), "", samples),
        Cell(NOTHING if share is None else f"{100 * share:.0f} %", "", share),
    )


def _comparable_peak(row: Row, base: Row | None) -> float | None:
    """A measured peak is not divided by a predicted one."""
    if base is None or is_predicted(row) != is_predicted(base):
        return None
    return base["peak_allocated_bytes"]


def _reserved(row: Row) -> str:
    reserved = row.get("peak_reserved_bytes")
    return "" if reserved is None else f"reserved {bytes_text(reserved)}"


def _spread(row: Row) -> str:
    low, high = row.get("p20_ms"), row.get("p80_ms")
    return "" if None in (low, high) else f"{number_text(low)} to {number_text(high)}"


def shortened(rows: Sequence[Row]) -> list[Row]:
    """Leave out policies by a rule that knows no result but the peak.

    Args:
        rows:  of one table
    Returns:
        end to end as it is; of each number of blocks the eager layers, the fused ones at the
        highest policy with everything on the device, and the fused ones with the lowest peak.
    """
    kept = []
    for row in rows:
        same = [each for each in rows if _fused(each) and each["num_blocks"] == row["num_blocks"]]
        lowest = min(same, key=lambda each: each["peak_allocated_bytes"], default=None)
        highest = (row["recompute"], row["offload"]) == (POLICIES[0], "none") and is_plain(row)
        if not _fused(row) or row is lowest or highest:
            kept.append(row)
    return kept


def with_policies(rows: Sequence[Row]) -> list[Row]:
    """Leave out less: what memory comes down to stands policy by policy.

    Args:
        rows:  of one table
    Returns:
        what `shortened` leaves, and the fused layers at every policy with one block on the device.
    """
    left = {id(row) for row in shortened(rows)}
    return [
        row
        for row in rows
        if id(row) in left or (_fused(row) and row["offload"] == "cpu" and is_plain(row))
    ]


def _fused(row: Row) -> bool:
    return row["method"] == "block_fused"


def overhead_table(rows: Sequence[Row]) -> Table | None:
    """Lay out what noise conditioning costs: a sweep against a step end to end in eager, minus 1.

    Args:
        rows:  of one table
    Returns:
        a column for each number of blocks, the fused layer at its highest policy and the eager one,
        both with everything on the device; None without times.
    """
    base = eager(rows)
    if base is None or base["sweep_ms"] is None:
        return None
    found: dict[str, dict[int, Cell]] = {method: {} for method in reversed(BLOCKWISE)}
    for row in rows:
        highest = (
            row["recompute"] in (POLICIES[0], None) and row["offload"] == "none" and is_plain(row)
        )
        if row["method"] in found and highest and row["sweep_ms"] is not None:
            change = row["sweep_ms"] / base["sweep_ms"] - 1
            found[row["method"]][row["num_blocks"]] = Cell(percent_text(change), "", change)
    counts = sorted({count for cells in found.values() for count in cells})
    if not counts:
        return None
    titles = {"block_fused": "fused layers, recompute none", "block_stock": "eager layers"}
    lines = tuple(
        (Cell(titles[method]), *(cells.get(count, Cell()) for count in counts))
        for method, cells in found.items()
        if cells
    )
    columns = (Column("blocks", left=True), *(Column(str(count), "min") for count in counts))
    return Table(columns, (("", lines),)).marked()
