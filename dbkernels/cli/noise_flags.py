"""The flags of noise: what a model makes of it, and how often each level is drawn."""

from dataclasses import dataclass, fields, replace

from dbkernels.cli.text_flags import require_settings
from dbkernels.diffusion.flow import Density
from dbkernels.diffusion.masked import MaskSchedule
from dbkernels.diffusion.path import PathName
from dbkernels.diffusion.prediction import PREDICTIONS, PredictionName
from dbkernels.diffusion.process import Process
from dbkernels.models.registry import FamilyEntry, ModelConfig


@dataclass(frozen=True)
class NoiseFlags:
    """What a model predicts from what; None keeps the preset's."""

    process: PathName | None = None
    """gaussian: sigma is added. flow: a straight path to noise, as in SD3, Flux and SiT. vp: 1000
    steps of a schedule, as in DDPM."""
    prediction: PredictionName | None = None
    """gaussian: edm. flow: velocity or x0. vp: epsilon, v or x0. Without it, the first of them."""

    def of(self, model: ModelConfig) -> ModelConfig:
        """A model with what was asked for.

        Raises:
            ValueError: it has no such setting, or its process has no such prediction.
        """
        given: dict[str, str | None] = {"process": self.process, "prediction": self.prediction}
        changed = {name: value for name, value in given.items() if value is not None}
        require_settings("the model", changed, model)
        if self.process is not None and self.prediction is None:
            changed["prediction"] = next(iter(PREDICTIONS[self.process]))
        return replace(model, **changed)


# values are judged where the configuration is made: the parser would name its own inner fields
@dataclass(frozen=True)
class PriorFlags:
    """The prior over the levels of noise; None keeps the family's own."""

    mean: float | None = None
    """Mean of ln sigma; of a flow, of ln(t / (1 - t)) before the shift."""
    std: float | None = None
    """Standard deviation of the same."""
    sigma_min: float | None = None
    """Least level, in units of z."""
    sigma_max: float | None = None
    """Greatest level, in units of z."""
    density: Density | None = None
    """Of the times of a flow: logit_normal as in SD3 and Flux, or uniform as in SiT."""
    time_shift: float | None = None
    """By which times of a flow are moved towards the noise: t = s u / (1 + (s - 1) u)."""
    t_min: float | None = None
    """Least time of a flow."""
    t_max: float | None = None
    """Greatest time of a flow, up to 1."""
    schedule: MaskSchedule | None = None
    """How the share of tokens that are not masked falls, for masked diffusion."""
    paper: bool = False
    """The paper's prior, not the family's own; evaluation from noise is the rest of its way."""

    def of(self, entry: FamilyEntry, model: ModelConfig) -> Process:
        """The prior of a model of a family with what was asked for.

        Raises:
            ValueError: a setting is none of the model's process, or has no value that it can have.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "paper"}
        changed = {name: value for name, value in given.items() if value is not None}
        process = entry.process_of(model)
        if self.paper and process is not entry.process:
            raise ValueError("paper must be False for noise that is not the paper's, got True")
        process = entry.paper if self.paper else process
        require_settings("the prior", changed, process)
        return replace(process, **changed)
