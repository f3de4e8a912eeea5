"""Rows that differ by their seed alone, as one row."""

import statistics
from collections.abc import Sequence

from show import Row


def over_seeds(rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The first row, with the number of seeds and each list of figures as its mean and spread.

    Args:
        rows:   of one way, at least one
        names:  of the lists, those that a row has; NAME_spread is the standard deviation
    """
    row = {**rows[0], "seeds": len(rows)}
    for name in (name for name in names if name in row):
        places = list(zip(*(each[name] for each in rows), strict=True))
        row[name] = [statistics.fmean(place) for place in places]
        row[f"{name}_spread"] = [statistics.stdev(p) if len(p) > 1 else 0.0 for p in places]
    return row
