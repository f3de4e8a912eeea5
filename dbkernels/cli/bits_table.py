"""What `evaluate` says of models of text: bits per character, beside networks end to end."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from statistics import fmean

from rich.table import Table
from rich.text import Text

from dbkernels.cli.run_table import over_seeds, run_table
from dbkernels.cli.table import Cells, Row
from dbkernels.models.registry import family_named
from dbkernels.training.run_config import RunConfig
from dbkernels.training.text_bits import TextEvaluation

BESIDE = {  # how many more bits a run has than those end to end of other layers
    "more_than_all_layers": "more than\nall layers",
    "more_than_a_blocks_layers": "more than a\nblock's layers",
}
NOISY = {
    "bits_down_to_least": "down to the\nleast level",
    "bits_at_most_noise": "at the\nmost noise",
    "sampler_bits": "of the\nsampler",
}
FIGURES = ("bits", "bits_of_blocks", *BESIDE, *NOISY, "sampler_bits_once")


def bits_row(found: TextEvaluation, config: RunConfig, layers: Sequence[int]) -> Row:
    """The figures of an evaluation, None where the run has none of a kind.

    Args:
        found:   of a run
        config:  of the run
        layers:  of each of its blocks
    """
    sampler = found.sampler and asdict(found.sampler)
    # where a family has no network without noise, one block is it
    alone = not family_named(config.family).conventional and len(layers) == 1
    return {
        "layers": list(layers),
        "end_to_end": config.objective == "conventional" or alone,
        "data": config.data,
        "windows": found.windows,
        "tokens": found.tokens,
        "bits": found.bits,
        "bits_of_blocks": found.blocks,
        "bits_down_to_least": found.least,
        "bits_at_most_noise": found.most_noise,
        "stop": found.stop,
        "sampler_bits": sampler and sampler.pop("bits"),
        "sampler_bits_once": sampler and sampler.pop("once"),
        "sampler": sampler,
        "curves": [asdict(curve) for curve in found.curves],
    }


def compare(rows: Sequence[Row]) -> list[Row]:
    """The rows, of which those of blocks tell how many more bits they have than end to end.

    That is the mean of the runs of the same family and data that have all of its layers, or those
    of its block of the most noise, which knows of the context what they do.
    """
    return [row | _beside(row, rows) if "bits" in row else row for row in rows]


def _beside(row: Row, rows: Sequence[Row]) -> Row:
    same = ("family", "data")
    others = [r for r in rows if r.get("end_to_end") and all(r[k] == row[k] for k in same)]
    found = {}
    for name, layers in zip(BESIDE, (sum(row["layers"]), row["layers"][0]), strict=True):
        bits = [r["bits"] for r in others if r["layers"] == [layers]]
        found[name] = row["bits"] - fmean(bits) if bits and not row["end_to_end"] else None
    return found


def bits_tables(rows: Sequence[Row]) -> list[Table | Text | str]:
    """The tables of the rows that have bits, if there are any: all, and those with noise."""
    rows = [row for row in rows if "bits" in row]
    if not rows:
        return []
    every = [*rows, *over_seeds(rows, FIGURES)]
    beside = [name for name in BESIDE if any(row[name] is not None for row in rows)]
    headings = ["layers", "blocks", "seed", "bits per\ncharacter", *(BESIDE[n] for n in beside)]

    def cells(row: Row, number: Callable[[float], str]) -> Cells:
        layers = row["layers"]
        cut = [str(sum(layers)), str(len(layers)), str(row["seed"]), number(row["bits"])]
        return [*cut, *(_number(row[name], number) for name in beside)]

    tables: list[Table | Text | str] = [run_table(every, headings, cells)]
    if blocks := [row for row in every if len(row["layers"]) > 1 or row["stop"] is not None]:
        tables += ["", _of_blocks(blocks)]
    return [*tables, Text(_read(rows))]


def _of_blocks(rows: Sequence[Row]) -> Table:
    noisy = [name for name in NOISY if any(row[name] is not None for row in rows)]

    def cells(row: Row, number: Callable[[float], str]) -> Cells:
        each = " ".join(map(number, row["bits_of_blocks"]))
        return [str(row["seed"]), each, *(_number(row[name], number) for name in noisy)]

    headings = ["seed", "bits of\neach block", *(NOISY[name] for name in noisy)]
    return run_table(rows, headings, cells)


def _number(value: float | None, number: Callable[[float], str]) -> str:
    return "" if value is None else number(value)


def _read(rows: Sequence[Row]) -> str:
    """What was read of the texts, and how they were sampled: a line for each way."""
    read = [f"read: {r['windows']} windows of {r['tokens'] // r['windows']} tokens" for r in rows]
    sampled = [
        f"sampler: {told['bridge']}, {len(told['levels'])} levels, {told['starts']} starts, "
        f"{told['tokens']} tokens of {told['windows']} windows"
        for told in (row["sampler"] for row in rows)
        if told
    ]
    return "\n".join(dict.fromkeys([*read, *sampled]))
