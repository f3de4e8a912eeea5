"""Tables with a line for each run, and for what runs have in common that differ by their seed."""

import os
from collections.abc import Callable, Collection, Sequence

import numpy as np
from rich import box
from rich.table import Column, Table

from dbkernels.cli.table import Cells, Row

SPREAD = "spread"  # name of the row of standard deviations


def over_seeds(rows: Sequence[Row], figures: Collection[str]) -> list[Row]:
    """For every setting that several runs share, the mean of each figure and its spread."""
    found = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        group = [row for row in rows if row["setting"] == setting]
        if len(group) == 1:
            continue
        runs = {"run": f"mean of {len(group)} seeds", "seed": ""}
        mean, spread = {**group[0], **runs}, {**group[0], "run": SPREAD, "seed": ""}
        for name in figures:
            if mean.get(name) is not None:
                values = [row[name] for row in group]
                mean[name], spread[name] = np.mean(values, axis=0), np.std(values, axis=0, ddof=1)
        found += [mean, spread]
    return found


def run_table(
    rows: Sequence[Row], headings: Cells, cells: Callable[[Row, Callable[[float], str]], Cells]
) -> Table:
    """A table of runs.

    Args:
        rows:      of runs, and of `over_seeds`
        headings:  of the columns behind the runs' names
        cells:     (row, how it writes a number) -> what stands in these columns
    """
    names, parent = _short_names([str(row["run"]) for row in rows if row["seed"] != ""])
    caption = parent and f"runs of {parent}"
    table = Table(
        Column("run", overflow="fold"), *headings, box=box.SIMPLE_HEAD, show_edge=False,
        padding=(0, 1, 0, 0), caption=caption, min_width=len(caption),  # so that it is one line
    )  # fmt: skip
    for row in rows:
        digits = ".1g" if row["run"] == SPREAD else ".4g"
        table.add_row(names.get(row["run"], row["run"]), *cells(row, f"{{:{digits}}}".format))
    return table


def _short_names(paths: list[str]) -> tuple[dict[str, str], str]:
    """The paths without the directory that they have in common, and that directory."""
    parents = [os.path.dirname(path) for path in paths]
    absolute = {os.path.isabs(path) for path in paths}
    parent = os.path.commonpath(parents) if len(absolute) == 1 else ""
    return {path: os.path.relpath(path, parent) if parent else path for path in paths}, parent
