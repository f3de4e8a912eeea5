"""What `plan --quality` says: the partitions of a network by the loss that they are to have."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.table import Table
from rich.text import Text

from dbkernels.cli.device import pick_device
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.table import Row, table
from dbkernels.cli.train_command import train_command
from dbkernels.memory.allocator import Target
from dbkernels.memory.units import in_words
from dbkernels.planning import quality, search
from dbkernels.planning.recipe import Recipe
from dbkernels.planning.ways import ways_of
from dbkernels.training.run_config import RunConfig

NEAR = 0.02  # of a loss: what is nearer than this is not worth memory
LITTLE = 0.05  # of what there is to learn
SHOWN = 12  # ways on a screen


def quality_rows(run_dirs: Sequence[Path], target: Target, memory: int | None) -> list[Row]:
    """The law, then the recommended way, then every other that fits, the least loss first.

    Of the ways whose loss is within NEAR of the least, the one that needs least memory is
    recommended.

    Args:
        run_dirs:  of runs in one block
        target:    the device that peaks and times are predicted of
        memory:    bytes of it; None is no limit
    Raises:
        ValueError: as `read_curves`, or nothing fits.
    """
    with ProgressBar("evaluating", 0, "levels") as shown:

        def told(done: int, total: int) -> None:
            shown.total = total
            shown.step(done)

        curves = quality.read_curves(run_dirs, device=pick_device("auto"), told=told)
    law, curve = quality.law_of(curves), quality.longest(curves)
    found = [quality.predict(curve, law, way) for way in ways_of(curve)]
    costs: dict[tuple[int, str], search.Estimate] = {}
    with ProgressBar("predicting", len(found), "ways") as shown:
        for done, each in enumerate(found, start=1):
            cut = _cut(each.config)
            if cut not in costs:
                costs[cut] = search.estimate(_recipe(each.config, target))["none"]
            shown.step(done)
    rows = [_row(each, costs, curve.config) for each in found]
    limit = None if memory is None else memory - search.context_bytes(target)
    fits = [row for row in rows if limit is None or row["peak_reserved_bytes"] <= limit]
    if memory is not None and not fits:
        least = min(row["peak_reserved_bytes"] for row in rows) + search.context_bytes(target)
        raise ValueError(
            f"memory must be at least {in_words(least)} for this network at batch "
            f"{curve.config.trainer.batch_size} with nothing computed again, got {in_words(memory)}"
        )
    told_of = {
        "row": "law",
        "runs": [str(directory) for directory in run_dirs],
        "family": curve.config.family,
        "depth": curve.config.model.depth,
        "steps": curve.config.trainer.steps,
        "batch": curve.config.trainer.batch_size,
        "target": target.name,
        "memory": memory,
        "exponent_of_depth": law.depth,
        "exponent_of_samples": law.samples,
        "depth_measured": law.depth_measured,
        "samples_measured": law.samples_measured,
        "curve": curve.losses.tolist(),
    }
    return [told_of, *ranked(fits)]


def ranked(rows: Sequence[Row]) -> list[Row]:
    """Rows of ways in the order in which they are told: the recommended one first."""

    def idle(row: Row) -> int:
        return sum(share < LITTLE for share in row["to_learn"])

    # of what is alike, blocks that all have something to learn, and then what comes first
    ranked = sorted(rows, key=lambda row: (float(f"{row['loss']:.4g}"), idle(row)))
    near = [row for row in ranked if row["loss"] <= (1 + NEAR) * ranked[0]["loss"]]
    best = min(near, key=lambda row: (row["peak_reserved_bytes"], idle(row)))
    return [best, *(row for row in ranked if row is not best)]


def _cut(config: RunConfig) -> tuple[int, str]:
    return config.partition.num_blocks, config.partition.split


def _recipe(config: RunConfig, target: Target) -> Recipe:
    """How the run trains, on a device."""
    trainer, cut = config.trainer, config.partition
    layers, split = (
        tuple(map(int, text.split(","))) if text else None for text in (cut.layers, cut.split)
    )
    return Recipe(
        config.family,
        "",
        config.model,
        batch_size=trainer.batch_size,
        accumulate=trainer.accumulate,
        num_blocks=cut.num_blocks,
        layers=layers,
        split=split,
        recompute=config.model.recompute,
        sharing=cut.sharing,
        ema=trainer.ema,
        optimizer=trainer.optimizer,
        optimizer_in_backward=trainer.optimizer_in_backward,
        autocast=trainer.autocast,
        lora=config.lora,
        device=target,
    )


def _row(
    found: quality.Predicted, costs: dict[tuple[int, str], search.Estimate], base: RunConfig
) -> Row:
    config, cut = found.config, found.config.partition
    blocks = cut.cut(config.model.depth, config.prior)
    # a sweep computes every layer once, however they are split
    seconds = costs[cut.num_blocks, ""].seconds
    return {
        "row": "way",
        "num_blocks": cut.num_blocks,
        "scheme": cut.scheme if config.prior == base.prior else "equal_loss",
        "split": [len(block.layers) for block in blocks],
        "loss": found.loss,
        "loss_at_most_noise": found.at_most_noise,
        "block_losses": found.block_losses,
        "to_learn": found.to_learn,
        "levels": [[block.noise.low, block.noise.high] for block in blocks],
        "peak_reserved_bytes": costs[_cut(config)].peak_bytes,
        "relative_time": seconds / costs[1, ""].seconds,
        "command": train_command(config),
    }


def quality_screen(rows: Sequence[Row]) -> Iterator[Table | Text | str]:
    """The rows as a screen of 80 columns."""
    law, best, *others = rows
    count = len(law["runs"])
    room = "" if law["memory"] is None else f" with {in_words(law['memory'])}"
    title = f"{law['family']} of {law['depth']} layers, {law['steps']} updates of each, batch "
    title += f"{law['batch']}, on {law['target']}{room}"
    yield Text(title, style="bold")
    yield f"by {count} run{'s' * (count > 1)} in one block; the recommended partition first"
    columns = ("blocks", "scheme", "layers", "loss", "at most\nnoise", "peak", "time")
    yield table(columns, map(_cells, [best, *others[: SHOWN - 1]]), names=3)
    if len(others) >= SHOWN:
        yield f"{len(others) - SHOWN + 1} more, of higher loss, are in --json"
    yield "\nthe recommended one, block by block"
    yield table(("block", "layers", "levels of noise", "to learn", "loss"), _of_blocks(best))
    yield "\n".join(_told(law, best))
    yield "\nTo train by it:\n  " + _in_lines(best["command"])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row["num_blocks"]),
        row["scheme"].replace("_", " ") if row["num_blocks"] > 1 else "",
        ",".join(map(str, row["split"])),
        f"{row['loss']:.4g}",
        f"{row['loss_at_most_noise']:.4g}",
        in_words(row["peak_reserved_bytes"]),
        f"{row['relative_time']:.2f}",
    )


def _of_blocks(row: Row) -> Iterator[tuple[str, ...]]:
    every = zip(row["split"], row["levels"], row["to_learn"], row["block_losses"], strict=True)
    for index, (layers, (low, high), share, loss) in enumerate(every):
        noise = f"{low:.3g} to {high:.3g}"
        yield str(index), str(layers), noise, f"{share:.0%}", f"{loss:.4g}"


def _told(law: Row, best: Row) -> Iterator[str]:
    """What the columns are, and what the prediction rests on."""
    idle = [str(index) for index, share in enumerate(best["to_learn"]) if share < LITTLE]
    if idle:
        yield f"There is little to learn for block {', '.join(idle)}."
    depth, samples = law["exponent_of_depth"], law["exponent_of_samples"]
    yield "loss: predicted mean on held-out data, over levels as the runs drew them"
    yield "peak: of the costliest step, with nothing more computed again"
    yield "time: of one update of every layer, as the planner predicts; 1.00 is one block"
    yield "to learn: share of the loss of one block that lies at the levels of each"
    yield f"recommended: of those within {NEAR:.0%} of the least loss, what needs least memory"
    yield "\nassumed: every layer is updated as often as in the runs; a block of n layers"
    yield f"has (n / {law['depth']})**-{depth:.2f} times the loss,"
    yield f"  {_source(law, 'depth', 'depth')};"
    yield f"B equally likely blocks have B**-{samples:.2f} times the loss,"
    yield f"  {_source(law, 'samples', 'steps')}"


def _source(law: Row, exponent: str, name: str) -> str:
    known = law[f"{exponent}_measured"]
    return "as the runs show" if known else f"a guess until a run of other {name} is given"


def _in_lines(command: str) -> str:
    """A command with a line for what decides the partition, and one for the rest."""
    for flag in ("--num-blocks", "--steps"):
        command = command.replace(f" {flag}", f" \\\n    {flag}", 1)
    return command
