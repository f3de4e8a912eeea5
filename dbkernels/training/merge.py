"""One run of blocks that were trained apart, each by a job of its own."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch

from dbkernels.training import checkpoint
from dbkernels.training.block_order import BlockOrder
from dbkernels.training.checkpoint.shard import Tensors
from dbkernels.training.log import LOG, one_writer, read_log
from dbkernels.training.run import PLACEMENT, load_checkpoint
from dbkernels.training.run_config import VERSION, RunConfig, read_config, write_config
from dbkernels.training.same_run import require_same_config
from dbkernels.training.samples import STREAM
from dbkernels.training.trained import KEPT
from dbkernels.whole_file import write_whole

# counts that are one number for a run, of which the least serves all blocks
LEAST = ("steps_per_swap", "micro_batch")


class _Part(NamedTuple):
    """What one block's job has saved."""

    path: Path
    """Of its checkpoint."""
    config: RunConfig
    tensors: Tensors
    state: dict


def merge(directory: Path) -> Path:
    """Unite the newest checkpoints of all blocks of a run.

    What comes of it is a checkpoint of the run as one process would have made it, bit for bit:
    `evaluate`, `sample` and `train --resume` take it. The blocks' own directories stay as they are.

    Args:
        directory:  of the run, which holds block0, block1, ...; the checkpoint, config.json and the
                    log go there
    Returns:
        The directory of the checkpoint.
    Raises:
        ValueError: a block is missing or damaged, or one has another configuration or number of
            steps; or the directory holds another run, or one that has gone on, or goes on now.
    """
    parts = [_read(path) for path in _parts_of(directory)]
    config = parts[0].config
    _require_alike(parts)
    if (directory / "config.json").exists():
        there = _alike(read_config(directory), config)
        # blocks may have gone on for more steps since they were united
        there = replace(there, trainer=replace(there.trainer, steps=config.trainer.steps))
        require_same_config(asdict(there), asdict(config), directory)
    counters, tensors = _counters(parts), _united(parts)
    state = {"version": VERSION, "config": asdict(config), "counters": counters}
    if "conditions" in parts[0].state:
        state["conditions"] = parts[0].state["conditions"]
    with one_writer(directory):
        _require_no_later(directory / "checkpoints", counters["step"])
        write_config(config, directory)
        _copy_beside(parts[0].path.parents[1], directory)
        write_whole(directory / LOG, _log(parts, config))
        return checkpoint.save(directory / "checkpoints", counters["step"], tensors, state)


def _parts_of(directory: Path) -> list[Path]:
    """Directories of the blocks' runs, all that there must be."""
    there = directory.iterdir() if directory.is_dir() else iter(())
    found = {int(m[1]): path for path in there if (m := re.fullmatch(r"block(\d+)", path.name))}
    if not found:
        raise ValueError(
            f"{directory} must hold block0, block1, ... as `train --block` makes them, got none"
        )
    count = read_config(found[min(found)]).partition.num_blocks
    for block in range(count):
        if block not in found:
            there_are = ", ".join(found[each].name for each in sorted(found))
            raise ValueError(
                f"{directory} must hold block{block} of {count}, got {there_are} alone"
            )
    if max(found) >= count:
        raise ValueError(f"{directory} must hold {count} blocks, got block{max(found)} too")
    return [found[block] for block in range(count)]


def _read(path: Path) -> _Part:
    config = read_config(path)
    found, tensors, state, _ = load_checkpoint(config, path, "latest")
    own = path.name
    if (groups := list(state["counters"].get("groups", ()))) != [own]:
        raise ValueError(f"{found} must hold {own} alone, got {', '.join(groups) or 'no block'}")
    return _Part(found, config, tensors, state)


def _alike(config: RunConfig, like: RunConfig) -> RunConfig:
    """A configuration with what may differ as in another one."""
    same = {name: getattr(like.trainer, name) for name in PLACEMENT}
    return replace(config, data=like.data, trainer=replace(config.trainer, **same))


def _require_alike(parts: Sequence[_Part]) -> None:
    first, *others = parts
    steps = _steps(first)
    for part in others:
        require_same_config(
            asdict(_alike(part.config, first.config)), asdict(first.config), part.path
        )
        if _steps(part) != steps:
            raise ValueError(
                f"{part.path} must be at step {steps} of its block as {first.path}, got "
                f"{_steps(part)}"
            )
    if any(STREAM in part.state["counters"] for part in parts):
        raise ValueError(
            "data must be read by index for blocks to be merged, got a stream, of which each block "
            "has read its own"
        )
    trainer = first.config.trainer
    if trainer.order == "sequential" and steps < trainer.steps and others:
        raise ValueError(
            f"order must be shuffled to merge blocks at step {steps} of {trainer.steps}, got "
            "sequential, of which later blocks come when earlier ones are done"
        )
    turn = _counters(parts)["steps_per_swap"]
    if steps % turn and steps < trainer.steps:
        raise ValueError(
            f"blocks that take turns of {turn} steps must be merged between turns, got step {steps}"
        )


def _steps(part: _Part) -> int:
    return int(part.state["counters"]["step"])


def _counters(parts: Sequence[_Part]) -> dict:
    """As a process that has trained all blocks would have counted."""
    counted = [part.state["counters"] for part in parts]
    found: dict = {"step": sum(each["step"] for each in counted), "groups": {}}
    # blocks that end before they have measured how long their turns are to be take any
    found |= {name: max(min(each[name] for each in counted), 1) for name in LEAST}
    for each in counted:
        found["groups"] |= each["groups"]
        if "optimizer" in each:
            found.setdefault("optimizer", {}).update(each["optimizer"])
    return found


def _united(parts: Sequence[_Part]) -> Tensors:
    """Every tensor once; what several blocks read and none trains is the same in all."""
    found: Tensors = {}
    for part in parts:
        for group, named in part.tensors.items():
            into = found.setdefault(group, {})
            for name, tensor in named.items():
                if name in into and not torch.equal(into[name], tensor):
                    raise ValueError(
                        f"{part.path} must have the {name} of other blocks, got another"
                    )
                into[name] = tensor
    return found


def _require_no_later(root: Path, step: int) -> None:
    """Refuse to put a run back that has gone on since its blocks were united."""
    newest = checkpoint.latest(root)
    if newest is not None and (found := int(newest.name.removeprefix("step-"))) > step:
        raise ValueError(
            f"{newest.parent} must hold no later checkpoint than that of step {step} which the "
            f"blocks make, got step {found}"
        )


def _copy_beside(part: Path, directory: Path) -> None:
    """What lies beside a run's checkpoints and is the same for all of its blocks."""
    for path in part.iterdir():
        own = path.name in ("config.json", "tracked_as.txt") or path.name.startswith(("log", "."))
        if path.is_file() and not own:
            shutil.copyfile(path, directory / path.name)
    if (part / KEPT).is_dir():
        shutil.copytree(part / KEPT, directory / KEPT, dirs_exist_ok=True)


def _log(parts: Sequence[_Part], config: RunConfig) -> str:
    """The rows of all blocks in the order in which one process would have made them."""
    running = range(len(parts))[:: 1 if config.partition.noise_order == "first" else -1]
    order = BlockOrder(running, config.trainer)
    order.steps_per_swap = _counters(parts)["steps_per_swap"]
    rows = {
        (int(row["block"]), int(row["block_step"])): row
        for part in parts
        for row in read_log(part.path.parents[1] / LOG)
    }
    coming = order.coming(0, dict.fromkeys(range(len(parts)), 0))
    lines = []
    for step, each in zip(range(sum(map(_steps, parts))), coming, strict=False):
        if each in rows:
            row = {**rows[each], "step": step}
            if step:
                # the first row of a run alone tells them
                row.pop("threads", None)
            lines.append(f"{json.dumps(row)}\n")
    return "".join(lines)
