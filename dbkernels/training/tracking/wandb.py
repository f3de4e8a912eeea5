"""Weights & Biases: to files in the run's directory, until the user says otherwise."""

import os

from dbkernels.training.tracking.tracker import PROJECT, Row, TrackedRun, scalars


class WandbTracker:
    """Logs to a run of wandb, offline unless WANDB_MODE says how else.

    A run that goes on has the same id, under which `wandb sync` puts its parts together. Steps that
    are done again have the same numbers, and wandb keeps the first.
    """

    def __init__(self, run: TrackedRun):
        import wandb

        online = os.environ.get("WANDB_MODE", "offline") == "online"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.id,
            # offline it is refused with a warning
            resume="allow" if online else None,
            dir=str(run.directory),
            config=dict(run.config),
            mode=os.environ.get("WANDB_MODE", "offline"),
            # it would read along what is printed, and take the terminal from the bar
            settings=wandb.Settings(console="off"),
        )

    def write(self, row: Row) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)
