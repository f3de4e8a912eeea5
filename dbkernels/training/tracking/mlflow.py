"""MLflow: the store of MLFLOW_TRACKING_URI, or else mlflow's own in the current folder."""

import time
from collections.abc import Iterator, Mapping

from dbkernels.training.tracking.tracker import PROJECT, Row, TrackedRun, scalars

SECONDS = 1.0  # between two writes to the store, each of which takes milliseconds
LONGEST = 500  # characters of a parameter, that every version takes
TAG = "dbkernels.id"


class MlflowTracker:
    """Logs to a run of mlflow, which goes on where the run does."""

    def __init__(self, run: TrackedRun):
        import mlflow

        self._metric, self._client = mlflow.entities.Metric, mlflow.MlflowClient()
        experiment = self._client.get_experiment_by_name(PROJECT)
        place = experiment.experiment_id if experiment else self._client.create_experiment(PROJECT)
        tagged = f"tags.`{TAG}` = '{run.id}'"
        earlier = self._client.search_runs([place], filter_string=tagged) if run.first_step else []
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            made = self._client.create_run(place, run_name=run.name, tags={TAG: run.id})
            self._id = made.info.run_id
            params = [mlflow.entities.Param(*pair) for pair in flat(run.config)]
            self._client.log_batch(self._id, params=params)
        self._waiting: list[object] = []
        self._last = time.monotonic()

    def write(self, row: Row) -> None:
        now = time.time_ns() // 1_000_000
        for name, value in scalars(row).items():
            self._waiting.append(self._metric(name, float(value), now, row["step"]))
        if time.monotonic() - self._last >= SECONDS:
            self._flush()

    def close(self, *, finished: bool) -> None:
        self._flush()
        self._client.set_terminated(self._id, "FINISHED" if finished else "FAILED")

    def _flush(self) -> None:
        # a request takes no more than 1,000
        for first in range(0, len(self._waiting), 1000):
            self._client.log_batch(self._id, metrics=self._waiting[first : first + 1000])
        self._waiting, self._last = [], time.monotonic()


def flat(config: Mapping[str, object], above: str = "") -> Iterator[tuple[str, str]]:
    """Values by their path, such as model.dim."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{above}{name}.")
        else:
            yield f"{above}{name}", str(value)[:LONGEST]
