"""Tables of one layer and of the ops, and of the same case on several devices and commits."""

from collections.abc import Callable, Sequence
from itertools import groupby
from string import ascii_uppercase

from demo_drawing import bytes_text
from report_rows import SETTING, SUITES, Row, is_predicted, key
from report_tables import Cell, Column, Table
from report_text import blocks_text, case_text, number_text, ratio_text, way_text

LAYER_COLUMNS = (
    Column("one layer, forward and backward", left=True),
    Column("kept, D per token", "min"),
    Column("peak", "min"),
    Column("of eager"),
    Column("ms", "min"),
    Column("of eager"),
    Column("TFLOP/s", "max"),
)
OPS_COLUMNS = (
    Column("implementation", left=True),
    Column("ms", "min"),
    Column("of eager"),
    Column("bytes to move"),
    Column("GB/s", "max"),
    Column("of copies"),
    Column("allocates", "min"),
)


def layer_table(rows: Sequence[Row]) -> Table:
    """Lay out the competitors of one layer.

    Args:
        rows:  of one table
    Returns:
        the table, its best figures marked.
    """
    base = _eager(rows)
    lines = tuple(_layer_line(row, base) for row in rows)
    return Table(LAYER_COLUMNS, (("", lines),)).marked()


def _layer_line(row: Row, base: Row | None) -> tuple[Cell, ...]:
    units, peak, ms, rate = (
        row[name] for name in ("saved_units", "peak_bytes", "median_ms", "achieved_tflops")
    )
    return (
        Cell(way_text(row), str(row.get("implementation") or "")),
        Cell(f"{units:.2f}", "", units),
        Cell(bytes_text(peak), "", peak),
        Cell(ratio_text(peak, base and base["peak_bytes"])),
        Cell(number_text(ms), _spread(row), ms),
        Cell(ratio_text(ms, base and base["median_ms"])),
        Cell(f"{rate:.3g}", "", rate),
    )


def ops_table(rows: Sequence[Row]) -> Table:
    """Lay out ops, a group for each op and direction.

    Args:
        rows:  of one table
    Returns:
        the table, its best figures marked.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row['op']} {row['direction']}", []).append(row)
    titled = (
        (title, tuple(_op_line(row, _eager(same)) for row in same))
        for title, same in groups.items()
    )
    return Table(OPS_COLUMNS, tuple(titled), "op").marked()


def _op_line(row: Row, base: Row | None) -> tuple[Cell, ...]:
    rate, ms, allocated = row["achieved_gbps"], row["median_ms"], row["allocated_bytes"]
    return (
        Cell(way_text(row), str(row.get("implementation") or "")),
        Cell(number_text(ms), _spread(row), ms),
        Cell(ratio_text(ms, base and base["median_ms"])),
        Cell(bytes_text(row["bytes_moved"])),
        Cell(f"{rate:.3g}", "", rate),
        Cell(ratio_text(rate, row.get("same_size_copy_gbps", row.get("copy_gbps")))),
        Cell(bytes_text(allocated), "", allocated),
    )


def _eager(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["impl"] == "eager"), None)


def _spread(row: Row) -> str:
    return f"{number_text(row['p20_ms'])} to {number_text(row['p80_ms'])}"


def settings(groups: Sequence[list[Row]]) -> dict[tuple, str]:
    """Give each setting a letter.

    Args:
        groups:  tables of `report_rows.tables`
    Returns:
        the letter by a row's key of SETTING, in the order of the tables.
    """
    found = dict.fromkeys(key(group[0], SETTING) for group in groups)
    return {place: _letter(number) for number, place in enumerate(found)}


def _letter(number: int) -> str:
    """A to Z, then A1."""
    turn, letter = divmod(number, len(ascii_uppercase))
    return ascii_uppercase[letter] + (str(turn) if turn else "")


def comparison(groups: Sequence[list[Row]], suite: str, letters: dict[tuple, str]) -> Table | None:
    """Lay out every way that was run in several settings, against the first of them.

    Args:
        groups:   tables of the suite
        suite:    one of SUITES
        letters:  of `settings`
    Returns:
        groups by case; a cell is what was measured and its ratio. None where nothing is shared.
    """
    of, ways = SUITES[suite], {}
    for row in (row for group in groups for row in group):
        same = ways.setdefault((case_text(row), key(row, of.way)), {})
        same[letters[key(row, SETTING)]] = row
    shared = {way: rows for way, rows in ways.items() if len(rows) > 1}
    used = [name for name in letters.values() if any(name in rows for rows in shared.values())]
    measures = [(f"{of.ms.removesuffix('_ms').replace('median', 'time')}, ms", of.ms, number_text)]
    measures += [("peak", of.peak, bytes_text)] if of.peak else []
    lines = tuple(
        (case, tuple(_shared_line(rows, used, measures) for _, rows in same))
        for case, same in groupby(sorted(shared.items(), key=lambda item: item[0][0]), _case)
    )
    columns = (
        Column("same case in each setting", left=True),
        *(Column(f"{title}, {name}") for title, _, _ in measures for name in used),
    )
    return Table(columns, lines, "case") if lines else None


def _case(item: tuple[tuple[str, tuple], dict]) -> str:
    return item[0][0]


def _shared_line(
    rows: dict[str, Row], used: Sequence[str], measures: Sequence[tuple[str, str, Callable]]
) -> tuple[Cell, ...]:
    first = next(rows[name] for name in used if name in rows)
    cells = [Cell(_way(first))]
    for _, name, text in measures:
        for letter in used:
            row = rows.get(letter)
            value = row and row[name]
            if value is None:
                cells.append(Cell())
                continue
            predicted = name == SUITES["training"].peak and is_predicted(row)
            # a measured peak is not divided by a predicted one
            alike = row is not first and is_predicted(row) == is_predicted(first)
            ratio = f"{ratio_text(value, first[name])} of the first" if alike else ""
            cells.append(Cell(text(value), ratio, None, predicted))
    return tuple(cells)


def _way(row: Row) -> str:
    if row["suite"] == "ops":
        return f"{row['op']} {row['direction']}, {row['impl']}"
    if row["suite"] == "layer":
        return way_text(row)
    one = ", offload cpu" if row["offload"] == "cpu" else ""
    return f"{blocks_text(row['num_blocks'])}, {way_text(row)}{one}"
