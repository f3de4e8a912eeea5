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

NEAR = 0.1  # of a loss: predictions that are nearer than this say little of each other
LITTLE = 0.05  # of what there is to learn


def quality_rows(run_dirs: Sequence[Path], target: Target, memory: int | None) -> list[Row]:
    """The law, then every way that fits, the least loss first.

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
    return [told_of, *sorted(fits, key=lambda row: row["loss"])]


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
    runs = f"{len(law['runs'])} run{'s' * (len(law['runs']) > 1)}"
    room = "" if law["memory"] is None else f" with {in_words(law['memory'])}"
    title = f"{law['family']} of {law['depth']} layers, {law['steps']} updates of each, batch "
    title += f"{law['batch']}, on {law['target']}{room}"
    yield Text(title, style="bold")
    yield f"partitions by the loss that is predicted from {runs} in one block, the least first"
    columns = ("blocks", "scheme", "layers", "loss", "at the most\nnoise", "peak", "time")
    yield table(columns, map(_cells, rows[1:]), names=3)
    yield f"\nthe first of them, block by block\n{_blocks_told(best)}"
    yield table(("block", "layers", "levels of noise", "to learn", "loss"), _of_blocks(best))
    yield "\n".join([*_assumed(law), "", *_near(best, others), "To train by the first of them:"])
    yield "  " + best["command"].replace(" --", " \\\n    --")


def _cells(row: Row) -> tuple[str, ...]:
    return (
        str(row["num_blocks"]),
        row["scheme"].replace("_", " ") if row["num_blocks"] > 1 else "",
        ", ".join(map(str, row["split"])),
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


def _blocks_told(row: Row) -> str:
    idle = [str(index) for index, share in enumerate(row["to_learn"]) if share < LITTLE]
    if not idle:
        return "to learn: share of the loss of one block that lies at its levels"
    return f"to learn: share of the loss of one block; there is little for {', '.join(idle)}"


def _assumed(law: Row) -> list[str]:
    """What the prediction rests on."""
    depth, samples = law["exponent_of_depth"], law["exponent_of_samples"]
    says = {
        True: "as the runs show",
        False: "which is assumed: give a run of another depth too",
    }
    lines = [
        "loss: mean over levels as the runs drew them, on held-out data",
        "peak, time: of an update of every layer with nothing more computed again, as",
        "the planner predicts; 1.00 is one block",
        f"A block of n of {law['depth']} layers has loss times (n / {law['depth']})**-{depth:.2f},",
        f"{says[law['depth_measured']]}.",
        f"A block that trains on d times as many samples at its levels: times d**-{samples:.2f},",
    ]
    if law["samples_measured"]:
        lines.append(f"{quality.KEPT:g} of the exponent of steps that the runs show.")
    else:
        lines.append("which is assumed: give a run of fewer steps too.")
    return lines


def _near(best: Row, others: Sequence[Row]) -> Iterator[str]:
    """Of those that are predicted to be about as good, the one that needs least."""
    near = [row for row in others if row["loss"] <= (1 + NEAR) * best["loss"]]
    least = min([best, *near], key=lambda row: row["peak_reserved_bytes"])
    if least is not best:
        yield (
            f"Within {NEAR:.0%} of the first, {least['num_blocks']} blocks of "
            f"{', '.join(map(str, least['split']))} layers need least: "
            f"{in_words(least['peak_reserved_bytes'])}."
        )
