"""Event files for TensorBoard, in the run's directory."""

from dbkernels.training.tracking.tracker import Row, TrackedRun, scalars


class TensorBoardTracker:
    """Writes to directory/tensorboard; rows of steps that are done again are hidden."""

    def __init__(self, run: TrackedRun):
        from torch.utils.tensorboard import SummaryWriter

        events = str(run.directory / "tensorboard")
        self._writer = SummaryWriter(events, purge_step=run.first_step or None)

    def write(self, row: Row) -> None:
        for name, value in scalars(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self, *, finished: bool) -> None:
        self._writer.close()
