"""What every family of models offers to the trainer and to the samplers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, get_args

from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.prediction import Prediction
from dbkernels.diffusion.process import Interval, Process
from dbkernels.models.model_config import ModelConfig
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice

Weighting = Literal["none", "process", "normalised", "published"]
WEIGHTINGS = get_args(Weighting)
# a `Family` that is an `nn.Module`; Python has no type of what is both
FamilyModule = Any


@dataclass(frozen=True)
class Defaults:
    """What the blocks of a model that is of no registered family have where nobody says another.

    A model may bring it as `defaults`. Its fields are as those of `FamilyEntry`.
    """

    process: Process
    weighting: Weighting
    metrics: Callable[[Tensor, Batch], dict[str, Tensor]] | None = None
    average: Callable[[Tensor], Tensor] | None = None


class Presets:
    """A model that has configurations under names; a base beside `nn.Module`."""

    presets: ClassVar[Mapping[str, ModelConfig]]
    smallest: ClassVar[str]
    """Name of the one that trains on any machine."""

    @classmethod
    def preset(cls, name: str) -> ModelConfig:
        """A configuration by name; the smallest where it is empty.

        Raises:
            ValueError: there is none of that name.
        """
        name = name or cls.smallest
        check_choice(f"preset of {cls.__name__}", name, cls.presets)
        return cls.presets[name]

    @classmethod
    def from_preset(cls, name: str) -> FamilyModule:
        """A new model of a preset; torch's own generator draws its weights."""
        made: FamilyModule = cls
        return made(cls.preset(name))


class Family(Protocol):
    """A network that can be trained block by block; it does not know how it is trained.

    layers:        the stack that a partition cuts; a block runs some of them
    sigma_data:    standard deviation of the clean target that the network assumes
    prediction:    what the network predicts, which has the path that its noisy samples are on, and
                   so the processes that it can be trained on; None where these are tokens
    target_parts:  names of the children that make the clean target. Where every block owns a copy
                   of what is shared, these stay common and frozen: the blocks must agree on the
                   space in which the signal passes from one to the next.
    stem_and_head: names of the methods that a step runs before and after the layers, for
                   `compile_stem_and_head`: tensors in and out, no graph break, no draw, no row of a
                   table
    independent:   whether the steps of a block read no layer of another, so that blocks may be
                   trained apart, and each alone be on the device
    """

    layers: nn.ModuleList
    sigma_data: float
    prediction: Prediction | None
    target_parts: ClassVar[tuple[str, ...]]
    stem_and_head: ClassVar[tuple[str, ...]]
    independent: bool

    def target(self, batch: Batch) -> Tensor:
        """The clean target z0, (B, ...): float32, or int64 where it is tokens."""

    def z_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of a noisy target, (B, ...), from what the batch conditions on alone."""

    def level_shape(self, batch: Batch) -> tuple[int, ...]:
        """Shape of the noise levels: (B,), or (B, T) where each token has its own."""

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Run some layers on z (B, ...) at their levels; the prediction, in the family's own form.

        All layers in order are the end-to-end network.
        """

    def loss(
        self,
        draw: Draw,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
        interval: Interval,
    ) -> Tensor:
        """Sum over the levels of scale times the loss at the level, () float32.

        Some layers denoise the target with the noise that `draw` names. Level, float32, and scale,
        float64, have `level_shape`. The levels are of the interval, whose bounds the host knows.
        """

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """The loss of each sample, (B,) float32 and unweighted, for evaluation."""

    def noisy(self, level: Tensor, batch: Batch, draw: Draw) -> Tensor:
        """z of the batch's own targets at the levels, with the noise that `loss` has of a draw."""

    def taught_loss(
        self,
        z: Tensor,
        taught: Tensor,
        share: float,
        level: Tensor,
        scale: Tensor,
        layers: Sequence[int],
        batch: Batch,
    ) -> Tensor:
        """The loss where a share of the target is what a teacher's `denoise` gave for this z.

        Level, scale and what comes back are those of `loss`.
        """

    def estimate(self, prediction: Tensor) -> Tensor:
        """The clean target that a prediction stands for, shape of z: what a sampler moves along."""
