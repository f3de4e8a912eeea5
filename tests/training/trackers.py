"""What the packages of trackers offer of what is used here, in memory."""

from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace


@dataclass
class Shown:
    """A run as a package shows it."""

    name: str
    id: str = ""
    options: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    curves: dict = field(default_factory=dict)  # (step, value) by name
    ends: list = field(default_factory=list)

    def add(self, name, step, value):
        self.curves.setdefault(name, []).append((step, value))


def wandb(runs):
    class Run:
        def __init__(self, shown):
            self.shown = shown

        def log(self, data, step=None):
            for name, value in data.items():
                self.shown.add(name, step, value)

        def finish(self, exit_code=None):
            self.shown.ends.append("finished" if exit_code == 0 else "failed")

    def init(*, project, mode, name="", id="", resume=None, dir="", config=None, settings=()):
        options = {"project": project, "dir": dir, "mode": mode, "resume": resume} | dict(settings)
        runs.append(Shown(name, id, options, config))
        return Run(runs[-1])

    module = ModuleType("wandb")
    module.init, module.Settings = init, lambda console: {"console": console}
    return module


def trackio(runs):
    class Run:
        def __init__(self, shown):
            self.shown = shown

        def log(self, metrics, step=None):
            for name, value in metrics.items():
                self.shown.add(name, step, value)

        def finish(self):
            self.shown.ends.append("finished")

    def init(project, name=None, *, config=None, resume="never"):
        for run in runs:
            if (run.name, run.options) == (name, {"project": project}):
                assert resume == "allow"
                return Run(run)
        runs.append(Shown(name, options={"project": project}, config=config))
        return Run(runs[-1])

    module = ModuleType("trackio")
    module.init = init
    # of the last run that was opened
    module.log = lambda metrics, step=None: Run(runs[-1]).log(metrics, step)
    module.finish = lambda: Run(runs[-1]).finish()
    return module


def mlflow(runs):
    @dataclass
    class Metric:
        key: str
        value: float
        timestamp: int
        step: int

    @dataclass
    class Param:
        key: str
        value: str

    def about(number):
        return SimpleNamespace(info=SimpleNamespace(run_id=number))

    class MlflowClient:
        experiments = []  # noqa: RUF012

        def get_experiment_by_name(self, name):
            there = name in self.experiments
            return SimpleNamespace(experiment_id=f"of {name}") if there else None

        def create_experiment(self, name):
            assert name not in self.experiments
            self.experiments.append(name)
            return f"of {name}"

        def create_run(self, experiment_id, start_time=None, tags=None, run_name=None):
            ((name, tag),) = tags.items()
            where = f"tags.`{name}` = '{tag}'"
            runs.append(Shown(run_name, tag, {"project": experiment_id, "where": where}))
            return about(len(runs) - 1)

        def search_runs(self, experiment_ids, filter_string=""):
            found = [n for n, run in enumerate(runs) if run.options.get("where") == filter_string]
            return [about(n) for n in found]

        def update_run(self, run_id, status=None, name=None):
            runs[run_id].ends.append(status)

        def log_batch(self, run_id, metrics=(), params=(), tags=()):
            assert len(metrics) <= 1000
            for metric in metrics:
                assert isinstance(metric.value, float) and metric.timestamp > 1.7e12
                runs[run_id].add(metric.key, metric.step, metric.value)
            assert all(isinstance(param.value, str) for param in params)
            runs[run_id].config.update({param.key: param.value for param in params})

        def set_terminated(self, run_id, status=None):
            runs[run_id].ends.append({"FINISHED": "finished", "FAILED": "failed"}[status])

    @contextmanager
    def start_run():
        runs.append(Shown("of a context"))
        yield

    module = ModuleType("mlflow")
    module.MlflowClient, module.start_run = MlflowClient, start_run
    module.log_metric = lambda key, value, step=None: runs[-1].add(key, step, value)
    module.entities = SimpleNamespace(Metric=Metric, Param=Param)
    return module


PACKAGES = {"wandb": wandb, "mlflow": mlflow, "trackio": trackio}
