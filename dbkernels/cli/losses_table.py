"""What `evaluate` says of runs that have losses and no bits."""

from collections.abc import Callable, Sequence

from rich.table import Table

from dbkernels.cli.run_table import over_seeds, run_table
from dbkernels.cli.table import Cells, Row
from dbkernels.training.evaluation import Evaluation

FIGURES = ("loss_at_sigma_max", "block_losses", "accuracy")


def losses_row(found: Evaluation) -> Row:
    """The figures of an evaluation."""
    row: Row = {"block_losses": found.block_losses, "loss_at_sigma_max": found.loss_at_most_noise}
    return row | ({"levels": found.levels, **found.metrics} if found.metrics else {})


def losses_tables(rows: Sequence[Row]) -> list[Table]:
    """The table of the rows that have losses, if there are any."""
    rows = [row for row in rows if "block_losses" in row]
    if not rows:
        return []
    headings = ["blocks", "seed", "loss of\neach block", "loss at\nsigma_max"]
    if any("accuracy" in row for row in rows):
        headings.append("accuracy after\neach step, %")

    def cells(row: Row, number: Callable[[float], str]) -> Cells:
        losses = " ".join(map(number, row["block_losses"]))
        accuracy = " ".join(f"{100 * share:.2f}" for share in row.get("accuracy", ()))
        most_noise = number(row["loss_at_sigma_max"])
        every = [str(row["num_blocks"]), str(row["seed"]), losses, most_noise, accuracy]
        return every[: len(headings)]

    return [run_table([*rows, *over_seeds(rows, FIGURES)], headings, cells)]
