"""Trackio: a database on this machine, which `trackio show` shows."""

from dbkernels.training.tracking.tracker import PROJECT, Row, TrackedRun, scalars


class TrackioTracker:
    """Logs to a run of trackio, which goes on where the run does."""

    def __init__(self, run: TrackedRun):
        import trackio

        config = dict(run.config)
        self._run = trackio.init(project=PROJECT, name=run.name, config=config, resume="allow")

    def write(self, row: Row) -> None:
        self._run.log(scalars(row), step=row["step"])

    def close(self, *, finished: bool) -> None:
        self._run.finish()
