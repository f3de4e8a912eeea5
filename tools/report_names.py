"""How a report writes a number and names a case, a way of training, and where rows come from."""

from collections.abc import Sequence

from report_rows import Row, is_predicted

from dbkernels.memory.units import in_words
from dbkernels.models import registry

# no acronyms of capitals alone
WRITTEN = {"vit": "ViT", "dit": "DiT", "mmdit": "MMDiT", "huginn": "Huginn"}
FAMILIES = {name: WRITTEN.get(name, name.upper()) for name in registry.FAMILIES}
LONG = {
    "end_to_end": "eager",
    "compiled": "torch.compile",
    "checkpointed": "checkpointed, every layer",
    "selective": "checkpointed, selective",
    "block_stock": "eager layers",
    "block_fused": "fused layers",
}


def number_text(value: float) -> str:
    """Write a number with three digits or more, such as "80.7", "129.6" or "2,525"."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:#.3g}"


def ratio_text(ratio: float) -> str:
    """Write a ratio with two digits after the point, and more where it is small."""
    return f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:#.2g}"


def blocks_text(count: int) -> str:
    """Name a number of blocks: "end to end", or "3 blocks"."""
    return "end to end" if count == 1 else f"{count} blocks"


def percent_text(share: float) -> str:
    """Write a share of 1, such as "81 %"."""
    return f"{100 * share:.0f} %"


def shares_text(shares: Sequence[float]) -> str:
    """Write shares of 1, such as "97.2, 96.1, 95.8 %"."""
    return f"{', '.join(f'{100 * share:.1f}' for share in shares)} %"


def case_text(row: Row) -> str:
    """Name a case, such as "DiT-S/2, batch 64, float32"."""
    if "data" in row:
        more = [row["sampler"]] if row.get("suite") == "noise" else []
        more += [f"{row['source_updates']} before"] if "source_updates" in row else []
        updates = f"{row['updates']} updates of batches of {row['batch']}"
        return ", ".join([str(row["data"]), updates, *more])
    if "processes" in row:
        count = "1 process" if row["processes"] == 1 else f"{row['processes']} processes"
        return f"{in_words(row['state_bytes'])} of {count}, products of {row['product']} rows"
    if "family" in row:
        join = "-" if "/" in row["preset"] else " "
        name = f"{FAMILIES[row['family']]}{join}{row['preset']}"
        words = f", {row['words']:,} words" if "words" in row else ""
        return f"{name}{words}, batch {row['batch']}, {row['dtype']}"
    sizes = [f"{k} = {row[k]}" for k in ("B", "T", "dim", "num_heads", "hidden") if k in row]
    kind = [f"{row['layer']} layer"] if "layer" in row else []
    sizes = [*kind, *sizes] or [" x ".join(map(str, row["shape"]))]
    return f"{', '.join(sizes)}, {row['dtype']}"


def way_text(row: Row) -> str:
    """Name a way, such as "fused layers, qkv"."""
    parts = [LONG[row["method"]] if "method" in row else row["impl"].removesuffix("_budget")]
    parts += [row["recompute"]] if row.get("recompute") else []
    parts += [] if row.get("budget") is None else [f"budget {row['budget']:g}"]
    parts += ["optimizer in backward"] if row.get("optimizer_in_backward") else []
    parts += ["as a CUDA graph"] if row.get("launch") == "graph" else []
    return ", ".join(parts)


def cut_text(row: Row) -> str:
    """Name a way with its blocks, such as "fused layers, qkv, 3 blocks, offload"."""
    offload = ", offload" if row["offload"] == "cpu" else ""
    return f"{way_text(row)}, {blocks_text(row['num_blocks'])}{offload}"


def mode_text(row: Row) -> str:
    """Name a way to cut a model of text, such as "4 blocks, next-token loss"."""
    ends = row["method"] == "end_to_end" or row["num_blocks"] > 1
    count = blocks_text(row["num_blocks"]) if ends else "1 block"
    return f"{count}, {row['mode']}" if row["mode"] else count


def mega_text(value: float) -> str:
    """Write a number in millions."""
    return number_text(value / 1e6)


def tera_text(value: float) -> str:
    """Write a number in millions of millions."""
    return f"{value / 1e12:.3g}"


def run_text(row: Row) -> str:
    """Name a way and what computes, such as "fused layers, qkv (cpp)"."""
    return f"{way_text(row)} ({row['implementation']})"


def place_text(row: Row) -> str:
    """Say which blocks are on the device: "all", or "1 of 3"."""
    return "all" if row["offload"] == "none" else f"1 of {row['num_blocks']}"


def commits_text(rows: Sequence[Row]) -> str:
    """Name the commits that rows were measured at."""
    names = list(dict.fromkeys(str(row["commit"] or "unknown") for row in rows))
    return f"commit{'s' * (len(names) > 1)} {', '.join(names)}"


def about(rows: Sequence[Row]) -> str:
    """Say where the rows of a table come from: the device, the commit and the commands."""
    row = rows[0]
    parts = [f"No {row['device']} has run what is predicted."] * any(map(is_predicted, rows))
    parts.append(f"{' or '.join(dict.fromkeys(map(_where, rows)))}, {commits_text(rows)}.")
    if row.get("copy_gbps"):
        rates = f"copies {row['copy_gbps']:.4g} GB/s and multiplies {row['matmul_tflops']:.3g}"
        parts.append(f"The device {rates} TFLOP/s.")
    timed = {f"{r['rounds']} rounds by {r['timing']}" for r in rows if r.get("timing")}
    parts += [f"Times are medians of {' or '.join(sorted(timed))}."] if timed else []
    commands = dict.fromkeys(f"`{r['command']}`" for r in rows)
    return f"{' '.join(parts)} Printed by {' and '.join(commands)}."


def _where(row: Row) -> str:
    driver = f", driver {row['driver']}" if row["driver"] else ""
    return (
        f"{row['device']}{driver}, {row['threads']} CPU threads, torch {row['torch']}, "
        f"triton {row['triton']}"
    )
