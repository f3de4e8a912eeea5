"""Tables of the README, rewritten from results between two marker comments.

`<!-- table: training -->` begins a table and `<!-- end -->` ends it. Words after the suite's name
choose presets of training, such as `<!-- table: training cifar100 S/2 -->`.
"""

import re
import textwrap
from collections.abc import Callable, Sequence

from report_benchmarks import layer_table, ops_table
from report_rows import Row, is_predicted, newest, tables
from report_tables import Table, markdown_table
from report_text import NOT_RUN, about, case_text
from report_training import OVERHEAD, PAPER_OVERHEAD, overhead_table, training_table, with_policies

BEGIN = re.compile(r"^<!-- table: *(.*?) *-->$", re.MULTILINE)
END = "<!-- end -->"
WIDTH = 120
RULE = """Of each number of blocks: eager layers, fused layers with recompute `none`, every policy
where one block is on the device, and what has the lowest peak; the results hold every policy."""
TABLES: dict[str, Callable[[Sequence[Row]], Table]] = {
    "training": lambda rows: training_table(with_policies(rows)),
    "layer": layer_table,
    "ops": ops_table,
}


def rewritten(text: str, rows: Sequence[Row]) -> str:
    """Put the tables of results between the markers of a README.

    Args:
        text:  of the README
        rows:  of `report_rows.read`; a table whose suite is not among them is left as it is, and a
            suite that is only drawn is passed over
    Returns:
        the text, of which nothing else has changed.
    Raises:
        ValueError: a suite of the rows has no marker, a table has no end, or a marker asks for what
            the rows do not hold.
    """
    suites = {row["suite"] for row in rows} & set(TABLES)
    for suite in sorted(suites - {words[0] for words in marked(text)}):
        raise ValueError(f"the README must have the marker <!-- table: {suite} -->, got none")
    parts, at = [], 0
    for match in BEGIN.finditer(text):
        end = text.find(END, match.end())
        following = BEGIN.search(text, match.end())
        if end < 0 or (following and following.start() < end):
            raise ValueError(f"{match[0]} must be followed by {END}, got none")
        suite, *presets = match[1].split()
        if suite in suites:
            parts += [text[at : match.end()], "\n", _tables(rows, suite, presets), "\n"]
            at = end
    return "".join([*parts, text[at:]])


def marked(text: str) -> list[list[str]]:
    """Find the tables that a README asks for.

    Args:
        text:  of the README
    Returns:
        the words of each marker: a suite, and presets.
    Raises:
        ValueError: a marker names no suite.
    """
    found = [match[1].split() or [""] for match in BEGIN.finditer(text)]
    for suite, *_ in found:
        if suite not in TABLES:
            raise ValueError(f"a marker must name one of {', '.join(TABLES)}, got {suite!r}")
    return found


def _tables(rows: Sequence[Row], suite: str, presets: Sequence[str]) -> str:
    groups = [group for group, _ in newest(tables(rows, suite), suite)]
    for preset in presets:
        if all(group[0].get("preset") != preset for group in groups):
            raise ValueError(f"the results must have rows of {suite} for {preset}, got none")
    chosen = [group for group in groups if not presets or group[0].get("preset") in presets]
    return "\n\n".join(_of(group) for group in chosen)


def _of(rows: Sequence[Row]) -> str:
    table, notes = TABLES[rows[0]["suite"]](rows), []
    parts = [f"{case_text(rows[0])}:", markdown_table(table)]
    if rows[0]["suite"] == "training":
        notes = [" ".join(RULE.split())]
        overhead = overhead_table(rows)
        if overhead:
            paper = f"{100 * PAPER_OVERHEAD:.1f} % in the paper"
            parts += [f"{OVERHEAD} ({paper}):", markdown_table(overhead)]
    if any(map(is_predicted, rows)):
        notes.append(f"Where it says so, a peak is {NOT_RUN}.")
    text = " ".join([*notes, about(rows)])
    filled = textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join([*parts, filled])
