"""Words and numbers of the report of benchmarks, the same on the page and in the README."""

from collections.abc import Sequence

from report_rows import TRAINED, Row

FAMILIES = {"dit": "DiT", "vit": "ViT"}
SHORT = {
    "end_to_end": "eager",
    "compiled": "compiled",
    "checkpointed": "checkpointed",
    "selective": "selective",
    "block_stock": "eager blocks",
    "block_fused": "fused blocks",
}
LONG = {
    "end_to_end": "eager",
    "compiled": "torch.compile",
    "checkpointed": "checkpointed, every layer",
    "selective": "checkpointed, selective",
    "block_stock": "eager layers",
    "block_fused": "fused layers",
}
ON_DEVICE = {"none": "all", "cpu": "one block"}  # by offload
NOTHING = "–"
NOT_RUN = "predicted, no GPU has run it"


def case_text(row: Row) -> str:
    """Name what was run.

    Args:
        row:  of any suite
    Returns:
        such as "DiT-S/2, batch 64, float32".
    """
    if row["suite"] in TRAINED:
        family = FAMILIES.get(row["family"], row["family"])
        join = "-" if "/" in str(row["preset"]) else " "
        return f"{family}{join}{row['preset']}, batch {row['batch']}, {row['dtype']}"
    if row["suite"] == "ops":
        return f"{' x '.join(str(size) for size in row['shape'])}, {row['dtype']}"
    sizes = (f"{name} = {row[name]}" for name in ("B", "T", "dim", "num_heads", "hidden"))
    return f"{', '.join(sizes)}, {row['dtype']}"


def way_text(row: Row) -> str:
    """Name how it was run.

    Args:
        row:  of any suite
    Returns:
        such as "fused, qkv" or "compiled, budget 0.5"
    """
    if row["suite"] == "ops":
        return row["impl"]
    trained = row["suite"] in TRAINED
    method = LONG[row["method"]] if trained else row["impl"].removesuffix("_budget")
    recompute = f", {row['recompute']}" if row["recompute"] else ""
    budget = "" if row["budget"] is None else f", budget {row['budget']:g}"
    return f"{method}{recompute}{budget}{more_text(row) if trained else ''}"


def more_text(row: Row) -> str:
    """Name what a step saves beside its policy.

    Args:
        row:  of training or timeline
    Returns:
        such as ", optimizer in backward", or nothing.
    """
    early = ", optimizer in backward" if row["optimizer_in_backward"] else ""
    return f"{early}, as a graph" if row["launch"] == "graph" else early


def blocks_text(count: int) -> str:
    """Count blocks.

    Args:
        count:  of blocks
    Returns:
        such as "3 blocks".
    """
    return f"{count} block{'s' if count > 1 else ''}"


def count_text(row: Row) -> str:
    """Count blocks in a figure.

    Args:
        row:  of training
    Returns:
        such as "6", or "1/6" where one of them is on the device.
    """
    return f"{'1/' if row['offload'] == 'cpu' else ''}{row['num_blocks']}"


def number_text(value: float | None) -> str:
    """Write a number with three digits, or more of them where it is 100 or above.

    Args:
        value:  or None
    Returns:
        such as "80.7", "129.6" or "2,525".
    """
    if value is None:
        return NOTHING
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def ratio_text(value: float | None, of: float | None) -> str:
    """Write a ratio with two digits behind the point, more where it is small.

    Args:
        value:  or None
        of:     what it is divided by, or None
    Returns:
        such as "0.34".
    """
    if value is None or of is None:
        return NOTHING
    ratio = value / of
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:#.2g}"


def percent_text(value: float) -> str:
    """Write a change with its sign.

    Args:
        value:  1 is all
    Returns:
        such as "+7.1 %" or "−3.0 %".
    """
    return f"{100 * value:+.1f} %".replace("-", "−")


def about(rows: Sequence[Row]) -> str:
    """Say where rows come from, as Markdown.

    Args:
        rows:  of one setting
    Returns:
        device, driver, versions, commit, and every command that printed one of them.
    """
    row = rows[0]
    driver = f", driver {row['driver']}" if row["driver"] else ""
    commands = " and ".join(f"`{name}`" for name in dict.fromkeys(str(r["command"]) for r in rows))
    text = (
        f"{row['device']}{driver}, {row['threads']} CPU threads, torch {row['torch']}, triton "
        f"{row['triton']}, commit {row['commit'] or 'unknown'}{_ceilings(row)}; "
        f"printed by {commands}"
    )
    timed = [
        f"{r['rounds']} rounds by {r['timing']}"
        for r in rows
        if r.get("rounds") and r.get("timing")
    ]
    if timed:
        text += f"; medians of {' or '.join(dict.fromkeys(timed))}"
    return f"{text}."


def _ceilings(row: Row) -> str:
    copy, matmul = row.get("copy_gbps"), row.get("matmul_tflops")
    if copy is None or matmul is None:
        return ""
    return f"; copies at {copy:.4g} GB/s, multiplies at {matmul:.3g} TFLOP/s"
