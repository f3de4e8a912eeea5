"""What `evaluate` says of runs that have losses and no bits."""

from collections.abc import Callable, Sequence
from statistics import fmean, stdev

from rich.table import Table

from dbkernels.cli.run_table import over_seeds, run_table
from dbkernels.cli.table import Cells, Row
from dbkernels.training.evaluation import Evaluation

ONE_START = ("accuracy_of_one_start", "accuracy_of_one_start_spread")  # over single starts
ANSWERS = {  # headings of what a classifier answers
    "accuracy": "accuracy after\neach step, %",
    "calibration_error": "calibration\nerror, %",
    ONE_START[0]: "accuracy of\none start, %",
}
FIGURES = ("loss_at_sigma_max", "block_losses", "accuracy", "calibration_error", *ONE_START)


def losses_row(found: Evaluation) -> Row:
    """The figures of an evaluation."""
    row: Row = {"block_losses": found.block_losses, "loss_at_sigma_max": found.loss_at_most_noise}
    if found.metrics:
        row |= {"levels": found.levels, **found.metrics}
    if single := found.starts.get("accuracy"):
        row |= {"accuracy_of_starts": single}
        row |= dict(zip(ONE_START, (fmean(single), stdev(single)), strict=True))
    return row


def losses_tables(rows: Sequence[Row]) -> list[Table]:
    """A table of the rows that have losses, if there are any, and one of those with an accuracy."""
    rows = [row for row in rows if "block_losses" in row]
    tables = [_losses(rows)] if rows else []
    answering = [row for row in rows if "accuracy" in row]
    return [*tables, _answers(answering)] if answering else tables


def _losses(rows: Sequence[Row]) -> Table:
    headings = ["blocks", "seed", "loss of\neach block", "loss at\nsigma_max"]

    def cells(row: Row, number: Callable[[float], str]) -> Cells:
        losses = " ".join(map(number, row["block_losses"]))
        most_noise = number(row["loss_at_sigma_max"])
        return str(row["num_blocks"]), str(row["seed"]), losses, most_noise

    return run_table([*rows, *over_seeds(rows, FIGURES)], headings, cells)


def _answers(rows: Sequence[Row]) -> Table:
    shown = [name for name in ANSWERS if any(name in row for row in rows)]

    def cells(row: Row, number: Callable[[float], str]) -> Cells:
        found = {name: _percent(row.get(name, ())) for name in ("accuracy", "calibration_error")}
        single = [row[name] for name in ONE_START if name in row]
        found[ONE_START[0]] = _percent(single, " ± ")
        return [str(row["num_blocks"]), str(row["seed"]), *(found[name] for name in shown)]

    headings = ["blocks", "seed", *(ANSWERS[name] for name in shown)]
    return run_table([*rows, *over_seeds(rows, FIGURES)], headings, cells)


def _percent(shares: Sequence[float], between: str = " ") -> str:
    return between.join(f"{100 * share:.2f}" for share in shares)
