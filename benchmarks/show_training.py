"""Rows of whole training steps as a table."""

from rich.table import Table

Row = dict[str, object]

MIB = 2**20


def training_case(row: Row) -> str:
    """What was trained; rows of a table have one."""
    dtype = "bfloat16 compute" if row["dtype"] == "autocast" else row["dtype"]
    return f"{row['family']} {row['preset']}, batch {row['batch']}, {dtype}, {row['device']}"


def training_table(rows: list[Row]) -> Table:
    """A row for each way; ratios are to end to end in plain torch."""
    eager = next((row for row in rows if row["method"] == "end_to_end"), None)
    columns = {
        "saved, MiB": lambda row: _number(row["saved_bytes"], MIB),
        "peak, MiB": lambda row: _number(row["peak_allocated_bytes"], MIB),
        "of eager": lambda row: _ratio(row, eager, "peak_allocated_bytes"),
    }
    timed = {
        "step, ms": lambda row: _number(row["step_ms"]),
        "p20 to p80": _spread,
        "sweep, ms": lambda row: _number(row["sweep_ms"]),
        "of eager ": lambda row: _ratio(row, eager, "sweep_ms"),
        "of matmul rate": lambda row: _number(row["share_of_matmul_rate"]),
    }
    if any(row["step_ms"] is not None for row in rows):
        columns |= timed
    title = f"a training step, memory {rows[0]['memory']}"
    table = Table(title=title, caption_justify="left")
    table.add_column("way", no_wrap=True)
    for column in ("blocks", *columns):
        table.add_column(column, justify="right", no_wrap="p20" in column)
    for row in rows:
        cells = (cell(row) for cell in columns.values())
        table.add_row(_way(row), str(row["num_blocks"]), *cells)
    return table


def timeline_table(rows: list[Row]) -> Table:
    """A row for each step: its peak, and the op that has it."""
    eager = next((row for row in rows if row["method"] == "end_to_end"), None)
    table = Table(title="a training step, op after op", caption_justify="left")
    table.add_column("way", no_wrap=True)
    for column in ("blocks", "peak, MiB", "of eager"):
        table.add_column(column, justify="right")
    table.add_column("at the peak")
    for row in rows:
        peak = _number(row["peak_allocated_bytes"], MIB)
        ratio = _ratio(row, eager, "peak_allocated_bytes")
        table.add_row(_way(row), str(row["num_blocks"]), peak, ratio, row["at"])
    return table


def training_about(row: Row) -> str:
    """What a table's figures come from."""
    about = f"torch {row['torch']}, triton {row['triton']}, commit {row['commit'] or 'unknown'}"
    driver = f", driver {row['driver']}" if row["driver"] else ""
    if row.get("step_ms") is None:
        return f"predicted without running for {row['device']}{driver}; {about}"
    return (
        f"{row['device']}{driver}, {row['threads']} CPU threads, {about}; "
        f"multiplies at {row['matmul_tflops']:.3g} TFLOP/s; "
        f"medians over {row['rounds']} rounds by {row['timing']}"
    )


def _way(row: Row) -> str:
    budget = None if row["budget"] is None else f"budget {row['budget']:g}"
    offload = "offload cpu" if row["offload"] == "cpu" else None
    # the number of blocks has a column of its own
    method = row["method"].removeprefix("block_").replace("_", " ")
    in_backward = "optimizer in backward" if row.get("optimizer_in_backward") else None
    graph = "graph" if row.get("launch") == "graph" else None
    parts = (method, row["recompute"], budget, offload, in_backward, graph)
    return " ".join(part for part in parts if part)


def _number(value: float | None, unit: int = 1) -> str:
    if value is None:
        return "–"
    return f"{value / unit:.0f}" if value >= 1000 * unit else f"{value / unit:.3g}"


def _spread(row: Row) -> str:
    return f"{_number(row['p20_ms'])} to {_number(row['p80_ms'])}"


def _ratio(row: Row, eager: Row | None, name: str) -> str:
    known = eager is not None and None not in (row[name], eager[name])
    return f"{row[name] / eager[name]:.2f}" if known else "–"
