"""`python -m dbkernels plan`."""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import tyro
from rich.table import Table
from rich.text import Text

from dbkernels.cli.plan_quality import quality_rows, quality_screen
from dbkernels.cli.preset import OfPreset, devices_of
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.table import Row, show, table
from dbkernels.memory.allocator import target_named
from dbkernels.memory.units import bytes_from, in_words
from dbkernels.models.registry import family_named
from dbkernels.planning import meshes, search
from dbkernels.planning.recipe import OTHERS, Recipe
from dbkernels.planning.search import OP_SECONDS, SHARE, STATE
from dbkernels.settings import check_number
from dbkernels.training.lora_config import Base, LoraConfig

MESH = "blocks", "at once", "data", "tensor", "recompute", "micro-batch", "peak", "time"
BREAK = " \\\n    "  # of a command that goes on in the next line


@dataclass(frozen=True, kw_only=True)
class Plan(OfPreset):
    """Say what limits a run, and which ways of training fit a device, the fastest first.

    All of it is predicted, peak memory by dry runs of the steps and time by a stated formula; no
    GPU is needed. A plan may cut a batch into micro-batches.
    """

    memory: str = ""
    """Memory of the device: a number and one of KiB, MiB, GiB, TiB, such as 24GiB. Only with
    quality it may be left out, for no limit."""
    quality: Annotated[
        tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(none)")
    ] = ()
    """Directories of short runs in one block: say which partition of their network would train
    best. Those of another depth, or of fewer steps, show how much layers and samples count."""
    target: str = "h100"
    """The device that is predicted: cpu, a100, h100, h200, b200."""
    gpus: int = 1
    """Devices that train it together. How they share blocks, batches and layers is searched for
    too, in place of data-parallel, tensor-parallel and shard. The batch is a multiple of them."""
    lora: int = 0
    """Rank of adapters on every layer, which alone are trained then; 0 trains the network."""
    lora_base: Base = LoraConfig.base
    """Dtype of the frozen network below adapters."""

    def run(self) -> None:
        if self.quality:
            self._say_quality()
            return
        if not self.memory:
            raise ValueError("memory must be given where quality is not asked for, got none")
        memory, recipe = bytes_from(self.memory), self.recipe(target_named(self.target))
        recipe = replace(recipe, lora=LoraConfig(self.lora, base=self.lora_base))
        check_number("gpus", self.gpus, 1)
        find = search.search
        if self.gpus > 1:
            if recipe.devices > 1 or recipe.shard:
                raise ValueError(
                    "data_parallel, tensor_parallel and shard must be left out with gpus, "
                    f"got {recipe.data_parallel}, {recipe.tensor_parallel} and {recipe.shard}"
                )
            if self.batch is None:
                batch = -(recipe.batch_size // -self.gpus) * self.gpus
                recipe = replace(recipe, batch_size=batch)
            find = partial(meshes.search_meshes, devices=self.gpus)
        with ProgressBar("predicting", 0, "parts") as shown:
            answer = find(recipe, memory=memory, told=partial(_tell, shown))
        if not answer.plans:
            raise ValueError(_nothing_fits(recipe, memory, answer, self.gpus))
        rows = list(rows_of(recipe, memory, answer, self.gpus))
        show(rows, screen(rows), as_json=self.json)

    def _say_quality(self) -> None:
        """Which partition is best for the network of some runs."""
        for each in fields(self):
            value = getattr(self, each.name)
            if value != each.default and each.name not in ("quality", "memory", "target", "json"):
                raise ValueError(
                    f"{each.name} must be left out with quality, which takes it from the runs, "
                    f"got {value}"
                )
        memory = bytes_from(self.memory) if self.memory else None
        rows = quality_rows(self.quality, target_named(self.target), memory)
        show(rows, quality_screen(rows), as_json=self.json)


def _tell(shown: ProgressBar, done: int, total: int, found: search.Found | None) -> None:
    """Show what has come, and a line for each plan."""
    shown.total = total
    shown.step(done)
    if found is None:
        return
    count = found.whole.recipe.num_blocks
    blocks = f"{count} block{'s' * (count > 1)}"
    if not found.plans:
        shown.say(f"{blocks}: nothing fits")
    for plan in found.plans:
        place = "" if plan.recipe.offload == "none" else ", one on the device"
        if plan.recipe.is_apart or plan.recipe.devices > 1:
            place = f", {plan.side_by_side} side by side with {plan.recipe.devices} for each"
        shown.say(
            f"{blocks}{place}: recompute {plan.recipe.recompute}, micro-batch "
            f"{plan.recipe.micro_batch}, peak {in_words(plan.peak_bytes)}"
        )


def _nothing_fits(recipe: Recipe, memory: int, answer: search.Answer, gpus: int) -> str:
    """One sentence: the smallest plan, what it needs, and what would fit instead."""
    least = answer.smallest.recipe
    needed = answer.smallest.peak_bytes + search.context_bytes(recipe.device)
    asked = f"batch {recipe.batch_size}"
    instead = "; no preset of the family fits"
    if answer.largest:
        instead = f"; the largest preset of the family that fits is {answer.largest}"
    if gpus > 1:
        asked += f" on {gpus} devices"
        instead = f", {least.data_parallel} to a batch and {least.tensor_parallel} to a layer"
    return (
        f"memory must be at least {in_words(needed)} for {recipe.family} {recipe.preset} at "
        f"{asked}, got {in_words(memory)}: that is its smallest plan, num_blocks "
        f"{least.num_blocks}, offload {least.offload}, recompute {least.recompute}, "
        f"micro-batch {least.micro_batch}{instead}"
    )


def rows_of(recipe: Recipe, memory: int, answer: search.Answer, gpus: int = 1) -> Iterator[Row]:
    """What limits end to end and the fastest plan, every plan, and the largest preset."""
    asked = ("family", "preset", "batch", "autocast", "target")
    common = {name: recipe.settings()[name] for name in asked}
    common |= {
        "optimizer": recipe.optimizer,
        "lora": recipe.lora.rank,
        "lora_base": recipe.lora.base,
    }
    common |= {name: value for name, value in recipe.settings().items() if name in OTHERS}
    common |= {"gpus": gpus} if gpus > 1 else {}
    common |= {"memory": memory, "context": search.context_bytes(recipe.device)}
    # where end to end is another network, one block is still the diffusion
    whole = "one block" if family_named(recipe.family).conventional else "end to end"
    for name, plan in ((whole, answer.whole), ("fastest plan", answer.plans[0])):
        # a device's share of them is another in another mesh
        outside = answer.outside if gpus == 1 else search.outside_layers(plan)
        parts = search.shares(plan, outside)
        limit = max((part for part in parts if part != search.FREE), key=parts.__getitem__)
        row = {"row": "limit", "of": name, "limit": limit, "by_category": parts}
        yield {**common, **row, "peak_reserved_bytes": plan.peak_bytes}
    for plan in answer.plans:
        yield {
            **plan.recipe.settings(),
            **common,
            "row": "plan",
            "micro_batch": plan.recipe.micro_batch,
            "peak_reserved_bytes": plan.peak_bytes,
            "by_category": plan.by_category,
            "flops": plan.flops,
            "seconds_per_sweep": plan.seconds,
            "relative_time": plan.seconds / answer.whole.seconds,
            "command": _command(plan),
            **({"side_by_side": plan.side_by_side} if gpus > 1 else {}),
        }
    if gpus == 1:
        yield {**common, "row": "preset", "largest": answer.largest}


def _command(plan: search.Estimate) -> str:
    recipe, apart = plan.recipe, plan.recipe.is_apart
    together = 1 < recipe.num_blocks == plan.side_by_side
    processes = recipe.devices * (recipe.num_blocks if together else 1)
    flags = {
        f"train {recipe.family} --preset {recipe.preset} --batch-size {recipe.batch_size}": True,
        f"--num-blocks {recipe.num_blocks} --recompute {recipe.recompute}": True,
        f"--accumulate {recipe.accumulate}": recipe.accumulate > 1,
        "--offload cpu --steps-per-swap 0": recipe.offload == "cpu",
        "--autocast": recipe.autocast,
        f"--optimizer {recipe.optimizer}": recipe.optimizer != "adamw",
        f"--from NETWORK --lora {recipe.lora.rank}": recipe.lora.rank > 0,
        f"--lora-base {recipe.lora.base}": recipe.lora != replace(recipe.lora, base="float32"),
        f"--tensor-parallel {recipe.tensor_parallel}": recipe.tensor_parallel > 1,
        "--shard": recipe.shard,
        "--sharing copies": apart,
        # and so on: a job for each block
        "--block 0": apart and not together,
    }
    several = f"torchrun --nproc-per-node {processes} -m dbkernels"
    program = "python -m dbkernels" if processes == 1 else several
    return " ".join([program, *(flag for flag, given in flags.items() if given)])


def _in_lines(command: str) -> str:
    """What is below a network, and what several devices share, in lines of their own."""
    shared = "--tensor-parallel", "--shard", "--sharing"
    starts = ["--batch-size"] if command.startswith("torchrun") else []
    starts += [flag for flag in shared if f" {flag}" in command][:1]
    for flag in ("--from", *starts):
        command = command.replace(f" {flag}", BREAK + flag)
    return command


def screen(rows: list[Row]) -> Iterator[Table | Text | str]:
    """The rows as a screen of 80 columns."""
    limits = [row for row in rows if row["row"] == "limit"]
    plans = [row for row in rows if row["row"] == "plan"]
    whole, best = limits
    compute = "bfloat16" if whole["autocast"] else "float32"
    run = f"{whole['family']} {whole['preset']}, batch {whole['batch']}, {compute} compute"
    run += "" if whole["optimizer"] == "adamw" else f", {whole['optimizer']}"
    run += f",\n{devices}" if (devices := devices_of(whole)) else ""
    if whole["lora"]:
        run += f",\nadapters of rank {whole['lora']} on a base in {whole['lora_base']}"
    fits = whole["peak_reserved_bytes"] <= whole["memory"] - whole["context"]
    gpus = whole.get("gpus", 1)
    left = f"; {in_words(whole['context'])} are left to CUDA's context" if whole["context"] else ""
    sent = ";\nnot by what the devices send each other" if gpus > 1 or devices_of(whole) else ""
    largest = rows[-1].get("largest")
    first, second = _in_lines(plans[0]["command"]).split(" --num-blocks")
    on = f"{gpus} x {whole['target']}, each" if gpus > 1 else whole["target"]
    yield Text(f"{run}, on {on} with {in_words(whole['memory'])}", style="bold")
    yield (
        f"{_whole(whole)} with nothing computed again it needs {_needed(whole)}, and "
        f"{'fits' if fits else 'does not fit'}: {_words(whole['limit'])} limit this run. "
        f"The fastest plan needs {_needed(best)}."
    )
    yield "\nwhat fills the device at the predicted peak"
    yield _limits(limits)
    yield "\nplans that fit, the fastest first"
    if gpus > 1:
        yield table(MESH, map(_mesh, plans), names=5)
    else:
        columns = ("blocks", "recompute", "on the device", "micro-batch", "peak", "time")
        yield table(columns, map(_choices, plans), names=3)
    if gpus > 1:
        yield (
            "at once: blocks that train side by side, each on devices of its own\n"
            "data, tensor: devices that share its batches, and its parameters; and each layer"
        )
    yield (
        f"peak: what the allocator takes{left}\n"
        f"time: of an update of every layer, 1.00 being {whole['of']} with nothing computed\n"
        f"again; by operations at {SHARE:.0%} of the device's peak, {OP_SECONDS * 1e6:.0f} us an "
        f"op, and swaps{sent}\nboth are predicted, not measured\n\n"
        + f"Largest preset of {whole['family']} that fits at all: {largest}.\n"
        * (gpus == 1)
        + "To train by the first of them, with --data and --out of your own:\n"
        f"  {first} \\\n    --num-blocks{second}"
    )


def _whole(row: Row) -> str:
    return {"end to end": "End to end", "one block": "As one block"}[row["of"]]


def _needed(row: Row) -> str:
    part = row["by_category"][row["limit"]] / row["peak_reserved_bytes"]
    return f"{in_words(row['peak_reserved_bytes'])}, {part:.0%} of it {_words(row['limit'])}"


def _choices(row: Row) -> tuple[str, ...]:
    # of several devices each has the block that it trains
    alone = row["offload"] == "cpu" or (row["num_blocks"] > 1 and devices_of(row))
    place = "one block" if alone else "all blocks"
    numbers = in_words(row["peak_reserved_bytes"]), f"{row['relative_time']:.2f}"
    return str(row["num_blocks"]), row["recompute"], place, str(row["micro_batch"]), *numbers


def _mesh(row: Row) -> tuple[str, ...]:
    shared = (str(row.get(f"{name}_parallel", 1)) for name in ("data", "tensor"))
    numbers = in_words(row["peak_reserved_bytes"]), f"{row['relative_time']:.2f}"
    start = str(row["num_blocks"]), str(row["side_by_side"]), *shared
    return *start, row["recompute"], str(row["micro_batch"]), *numbers


def _limits(limits: list[Row]) -> Table:
    lines, sizes = [], limits[0]["by_category"]
    for name in sorted(sizes, key=sizes.get, reverse=True):
        cells: list[str] = []
        for row in limits:
            size = row["by_category"][name]
            share = f"{size / row['peak_reserved_bytes']:.0%}"
            cells += [in_words(size), share] if size else ["", ""]
        if any(cells):
            lines.append((_words(name), *cells))
    return table(["", *(column for row in limits for column in (row["of"], ""))], lines)


def _words(category: str) -> str:
    words = category.replace("_", " ")
    return f"{words} of the layers" if category in STATE else words
