"""Whether a checkpoint is of the run that goes on from it, and what is another by now.

A resumed run has the bits of one that never stopped where its configuration, its data and the
conditions that `conditions` tells are the same.
"""

import hashlib
import json
import warnings
from functools import cache
from pathlib import Path
from typing import Literal, cast

import torch

from dbkernels.data.captions import CaptionedImages
from dbkernels.data.digest import digest
from dbkernels.data.images import Data, ImageData
from dbkernels.data.tokens import TokenData
from dbkernels.ops.backend.library import PATH, library
from dbkernels.training.checkpoint import as_json, check_state
from dbkernels.training.trainer_config import TrainerConfig

Conditions = dict[str, int | str]
DataChanged = Literal["refuse", "ok"]
MAX_DIFFERENCES = 5  # more make an error message that nobody reads
# of the conditions, those that move the last bits and no more
ROUNDING = ("threads", "processes", "torch", "library", "device")


def conditions(data: Data, device: torch.device, processes: int = 1) -> Conditions:
    """What the bits of a run depend on, beside its configuration.

    Args:
        data:       that it trains on
        device:     that it trains on
        processes:  that train each block
    """
    cuda = device.type == "cuda"
    return {
        "samples": len(data),
        # what a model's configuration opens is of these kinds
        "data": digest(cast(ImageData | CaptionedImages | TokenData, data)),
        # of the CPU, where it trains
        "threads": 0 if cuda else torch.get_num_threads(),
        "processes": processes,
        "torch": str(torch.__version__),
        "library": _library(),
        "device": torch.cuda.get_device_name(device) if cuda else device.type,
    }


def conditions_of(state: dict, path: Path) -> Conditions:
    """The conditions in the state of a checkpoint; none where it is of before there were any.

    Raises:
        ValueError: they are malformed.
    """
    saved = state.get("conditions", {})
    kinds = {"samples": int, "threads": int, "processes": int}
    if not isinstance(saved, dict) or any(
        type(value) is not kinds.get(name, str) for name, value in saved.items()
    ):
        raise ValueError(f"{path} must say what its bits depend on, got {str(saved)[:200]}")
    return saved


@cache
def _library() -> str:
    if library().reason is not None:
        return "none"
    return hashlib.sha256(PATH.read_bytes()).hexdigest()[:16]


def require_same_data(
    saved: Conditions,
    now: Conditions,
    *,
    moved: bool,
    path: Path,
    data_changed: DataChanged = "refuse",
) -> None:
    """Refuse to go on with other data, and say what else is another by now.

    Args:
        saved:         conditions in the checkpoint; none where it is of before there were any
        now:           conditions of this run
        moved:         whether the data are said to be elsewhere
        path:          the checkpoint, for messages
        data_changed:  ok goes on, and says what changed
    Raises:
        ValueError: the data are others, or not known to be the same where they moved.
    """
    told = {key: f"{key} was {saved[key]} and is {now[key]}" for key in saved if key in now}
    changed = [text for key, text in told.items() if saved[key] != now[key]]
    other = [text for text in changed if text.startswith(("samples", "data"))]
    if moved and "data" not in saved:
        other = [f"the data are elsewhere, and {path.name} has no digest of them"]
    if other and data_changed == "refuse":
        raise ValueError(
            f"data must be that of checkpoint {path}: {', '.join(other)}; "
            "--data-changed ok goes on with it"
        )
    for text in dict.fromkeys([*other, *changed]):
        warnings.warn(f"{text}: bits from here on may be others", stacklevel=2)


def require_same_schedule(
    saved: TrainerConfig, now: TrainerConfig, *, blocks: int, turn: int, step: int, path: Path
) -> None:
    """Refuse to go on for another number of steps where those before would have been others.

    Args:
        saved, now:  settings in the checkpoint and of this run
        blocks:      their number
        turn:        steps of a block in a row; 0 where that is not known yet
        step:        of the run, that the checkpoint has
        path:        the checkpoint, for the message
    Raises:
        ValueError: steps differ and have to be the same, with the reason.
    """
    if now.steps == saved.steps:
        return
    # whole turns, of which another length of the run changes none
    whole = saved.steps // max(turn, 1) * max(turn, 1) * blocks
    reasons = {
        "a run becomes no shorter": now.steps < saved.steps,
        f"the rate falls by a {saved.decay} that ends with them": saved.decay != "constant",
        "blocks are trained one after another": saved.order == "sequential" and blocks > 1,
        f"the last turns were shorter than {turn} steps": step > whole,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        raise ValueError(
            f"steps must be {saved.steps} as in checkpoint {path}, for {reason}, got {now.steps}"
        )


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix.removeprefix("."): value}
    parts = [_flatten(item, f"{prefix}.{key}") for key, item in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def require_same_config(saved: dict, current: dict, path: Path) -> None:
    """Refuse to resume a run under another configuration.

    Args:
        saved:    configuration in the checkpoint: nested dicts
        current:  configuration of this run: nested dicts; a tuple equals the same list
        path:     the checkpoint, for the message
    Raises:
        ValueError: with the differing keys, at most MAX_DIFFERENCES, and both values of each.
    """
    check_state(current, "current")
    # through JSON both: it makes a list of the tuple that was saved
    saved, current = (_flatten(json.loads(as_json(config))) for config in (saved, current))
    differing = [
        f"{key}: saved {saved.get(key, 'nothing')!r}, current {current.get(key, 'nothing')!r}"
        for key in sorted(saved.keys() | current.keys())
        if key not in saved or key not in current or saved[key] != current[key]
    ]
    if differing:
        shown = "; ".join(differing[:MAX_DIFFERENCES])
        raise ValueError(f"{len(differing)} settings differ from checkpoint {path}: {shown}")
