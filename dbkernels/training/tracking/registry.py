"""The trackers by name, and the package that each of them needs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Literal

from dbkernels.settings import check_choice
from dbkernels.training.tracking.mlflow import MlflowTracker
from dbkernels.training.tracking.tensorboard import TensorBoardTracker
from dbkernels.training.tracking.tracker import TrackedRun, Tracker
from dbkernels.training.tracking.trackio import TrackioTracker
from dbkernels.training.tracking.wandb import WandbTracker

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class TrackerEntry:
    """A tracker, and what must be there for it."""

    module: str  # that it imports; the extra that brings it has the tracker's name
    make: Callable[[TrackedRun], Tracker]


TRACKERS: dict[TrackerName, TrackerEntry] = {
    "tensorboard": TrackerEntry("torch.utils.tensorboard", TensorBoardTracker),
    "wandb": TrackerEntry("wandb", WandbTracker),
    "mlflow": TrackerEntry("mlflow", MlflowTracker),
    "trackio": TrackerEntry("trackio", TrackioTracker),
}


def trackers_named(text: str) -> list[TrackerName]:
    """Trackers by their names with commas between; none where the text is empty.

    Raises:
        ValueError: a name is unknown.
    """
    named = [name.strip() for name in text.split(",")] if text else []
    for name in named:
        check_choice("track", name, TRACKERS)
    return [known for name in named for known in TRACKERS if known == name]


def require_trackers(names: Sequence[TrackerName]) -> None:
    """Refuse trackers that cannot be.

    Raises:
        ValueError: a name is unknown or comes twice, or a package is missing.
    """
    for name in names:
        check_choice("track", name, TRACKERS)
        if names.count(name) > 1:
            raise ValueError(f"track must name a tracker once, got {name} twice")
        try:
            import_module(TRACKERS[name].module)
        except ImportError:
            raise ValueError(
                f"{name} must be installed to track a run (pip install dbkernels[{name}]), "
                "got an environment without it"
            ) from None
