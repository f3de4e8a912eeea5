"""What `python -m dbkernels plan` has found: rows for JSON, and a screen of them."""

from collections.abc import Iterator
from dataclasses import asdict

from rich.console import Console
from rich.table import Table

from dbkernels.cli.plan_search import Answer, Question
from dbkernels.memory.budget import in_words
from dbkernels.training.estimate import STATE
from dbkernels.training.plan import FREE, OP_SECONDS, SHARE, Plan, shares

Row = dict[str, object]


def rows(question: Question, found: Answer) -> Iterator[Row]:
    """What limits end to end and the fastest plan, every plan, and the largest preset."""
    common = {**asdict(question), "context": question.context}
    for name, plan in (("end to end", found.whole), ("fastest plan", found.plans[0])):
        parts = shares(plan.estimate, found.outside)
        limit = max((part for part in parts if part != FREE), key=parts.__getitem__)
        row = {"row": "limit", "of": name, "limit": limit, "by_category": parts}
        yield {**common, **row, "peak_reserved_bytes": plan.estimate.peak_bytes}
    for plan in found.plans:
        yield {**common, **_plan_row(plan, question, found.whole)}
    yield {**common, "row": "preset", "largest": found.largest}


def _plan_row(plan: Plan, question: Question, whole: Plan) -> Row:
    setting = plan.setting
    return {
        "row": "plan",
        "num_blocks": setting.num_blocks,
        "recompute": setting.recompute,
        "offload": plan.offload,
        "micro_batch": setting.micro_batch,
        "peak_reserved_bytes": plan.estimate.peak_bytes,
        "by_category": plan.estimate.by_category,
        "flops": plan.estimate.flops,
        "seconds_per_sweep": plan.seconds,
        "relative_time": plan.seconds / whole.seconds,
        "command": _command(plan, question),
    }


def _command(plan: Plan, question: Question) -> str:
    setting = plan.setting
    flags = [
        f"train {question.family} --preset {question.preset} --batch-size {question.batch}",
        f"--num-blocks {setting.num_blocks} --recompute {setting.recompute}",
    ]
    if setting.micro_batch < question.batch:
        flags.append(f"--accumulate {question.batch // setting.micro_batch}")
    if plan.offload == "cpu":
        flags.append("--offload cpu --steps-per-swap 0")
    if question.autocast:
        flags.append("--autocast")
    return " ".join(["python -m dbkernels", *flags])


def show(question: Question, found: list[Row], console: Console) -> None:
    """Print the rows as a screen of 80 columns."""
    limits = [row for row in found if row["row"] == "limit"]
    plans = [row for row in found if row["row"] == "plan"]
    whole, best = limits
    compute = "bfloat16" if question.autocast else "float32"
    run = f"{question.family} {question.preset}, batch {question.batch}, {compute} compute"
    device = f"{question.target} with {in_words(question.memory)}"
    console.print(f"{run}, on {device}", style="bold")
    console.print(_limits_said(whole, best))
    console.print("\nwhat fills the device at the predicted peak")
    console.print(_limits(limits))
    console.print("\nplans that fit, the fastest first")
    console.print(_plans(plans))
    console.print(_assumptions(question) + "\n")
    console.print(f"Largest preset of {question.family} that fits at all: {found[-1]['largest']}.")
    console.print("To train by the first of them, with --data and --out of your own:")
    first, second = plans[0]["command"].split(" --num-blocks")
    console.print(f"  {first} \\\n    --num-blocks{second}", soft_wrap=True)


def _limits_said(whole: Row, best: Row) -> str:
    limit = whole["memory"] - whole["context"]
    fits = "fits" if whole["peak_reserved_bytes"] <= limit else "does not fit"
    return (
        f"End to end with nothing computed again it needs {_needed(whole)}, and {fits}: "
        f"{_words(whole['limit'])} limit this run. The fastest plan needs {_needed(best)}."
    )


def _needed(row: Row) -> str:
    part = row["by_category"][row["limit"]] / row["peak_reserved_bytes"]
    return f"{in_words(row['peak_reserved_bytes'])}, {part:.0%} of it {_words(row['limit'])}"


def _limits(limits: list[Row]) -> Table:
    table = Table(show_edge=False)
    table.add_column("")
    for row in limits:
        table.add_column(row["of"], justify="right")
        table.add_column("", justify="right")
    names = sorted(limits[0]["by_category"], key=lambda name: -limits[0]["by_category"][name])
    for name in names:
        cells: list[str] = []
        for row in limits:
            size = row["by_category"][name]
            cells += (
                [in_words(size), f"{size / row['peak_reserved_bytes']:.0%}"] if size else ["", ""]
            )
        if any(cells):
            table.add_row(_words(name), *cells)
    return table


def _words(category: str) -> str:
    words = category.replace("_", " ")
    return f"{words} of the layers" if category in STATE else words


def _plans(plans: list[Row]) -> Table:
    table = Table(show_edge=False)
    table.add_column("blocks", justify="right")
    table.add_column("recompute")
    table.add_column("on the device")
    table.add_column("micro-batch", justify="right")
    table.add_column("peak", justify="right")
    table.add_column("time", justify="right")
    for row in plans:
        table.add_row(
            str(row["num_blocks"]),
            row["recompute"],
            "all blocks" if row["offload"] == "none" else "one block",
            str(row["micro_batch"]),
            in_words(row["peak_reserved_bytes"]),
            f"{row['relative_time']:.2f}",
        )
    return table


def _assumptions(question: Question) -> str:
    left = f"; {in_words(question.context)} are left to CUDA's context" if question.context else ""
    return (
        f"peak: what the allocator takes{left}\n"
        "time: of an update of every layer, 1.00 being end to end with nothing computed\n"
        f"again; by operations at {SHARE:.0%} of the device's peak, {OP_SECONDS * 1e6:.0f} us an "
        "op, and swaps\n"
        "both are predicted, not measured"
    )
