"""What blocks are worth on some data."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbkernels.data.dataset import as_data
from dbkernels.data.images import Batch, Data
from dbkernels.data.spaced import Spaced
from dbkernels.diffusion.bridges import BridgeName
from dbkernels.metrics.calibration import error_of_bins
from dbkernels.models.registry import TextNoise
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_number
from dbkernels.training.evaluation import (
    LEVELS_PER_BLOCK,
    SETTINGS,
    Evaluation,
    Passes,
    Told,
    batches,
)
from dbkernels.training.partition import block_at
from dbkernels.training.text_bits import Reading, TextData, TextEvaluation
from dbkernels.training.text_bound import conventional_bits
from dbkernels.training.text_evaluation import WINDOWS, evaluate_text
from dbkernels.training.together import Start, Together


class Evaluated(Together):
    """Blocks that are measured on some data, each on the levels that it serves.

    text:  what noise does to a text; None is no text
    """

    text: TextNoise | None = None

    @torch.no_grad()
    def loss_at(
        self, data: Data | Dataset, level: float, *, seed: int = 0, batch_size: int = 256
    ) -> float:
        """Mean loss over the data at one noise level, by the block that serves it, unweighted.

        At the highest level z holds nothing of the target, so there the loss cannot be won by
        copying it.
        """
        return self._loss_at(as_data(data), level, Passes(), seed=seed, batch_size=batch_size)

    def _loss_at(
        self, data: Data, level: float, passes: Passes, *, seed: int, batch_size: int
    ) -> float:
        block, total = block_at(self, level), 0.0
        model = self.of(block)
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            shape = model.level_shape(batch)
            levels = torch.full(shape, level, dtype=torch.float32, device=self.device)
            losses = model.losses(draw, levels, block.layers, batch)
            total += float(losses.sum())
            passes.made(len(losses))
        return total / len(data)

    @torch.no_grad()
    def evaluate(
        self,
        data: Data | Dataset,
        *,
        levels: int | Sequence[float] | None = None,
        start: Start | None = None,
        starts: int | None = None,
        bridge: BridgeName | None = None,
        samples: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        told: Told = lambda done, total: None,
    ) -> Evaluation | TextEvaluation:
        """What the blocks are worth on some data: losses and the family's own numbers, or bits.

        Args:
            data:        such as `open_data` or `as_data` gives, or a Dataset of dicts
            levels:      of the sampler, descending, or how many of equal probability. A classifier
                         answers after each; None is three, and of a text what `own_levels` says
            start:       of a classifier's steps, as for `predictions`; None is zero
            starts:      whose probabilities are averaged; None is one of a classifier, and of a
                         text STARTS, where 0 leaves the sampler out
            bridge:      of a text's sampler; None is DEFAULT_BRIDGE
            samples:     of the data, evenly spaced; None is all of them, and of a text WINDOWS
            seed:        of the noise
            batch_size:  samples at a time; it does not change the noise that they get
            told:        is called with the passes of a sample through a block that are done, and
                         with how many there are
        Returns:
            Of a model of text its bits per character.
        Raises:
            ValueError: a setting has a value that it cannot have, or is of another kind of model,
                or the data is not what the model was trained on.
        """
        given: dict[str, Any] = {"levels": levels, "start": start}
        given |= {"starts": starts, "bridge": bridge}
        for name, value in given.items():
            if value is not None and name not in SETTINGS[self.text]:
                raise ValueError(f"{name} must be None for {self._name}, got {value}")
        at = {"seed": seed, "batch_size": batch_size}
        data, was_training = as_data(data), self.training
        self.eval()
        try:
            if self.text is not None:
                reading = self._reading(data, samples, told, **at)
                del given["start"]
                return evaluate_text(self, self.text, reading, **given)
            if samples is not None:
                check_number("samples", samples, 1)
                data = Spaced(data, samples)
            steps = start or "zero", 1 if starts is None else starts
            grid = 3 if levels is None else levels
            return self._evaluate(data, grid, *steps, Passes(told), at)
        finally:
            self.train(was_training)

    @torch.no_grad()
    def evaluate_conventional(
        self,
        data: Data,
        *,
        samples: int | None = None,
        seed: int = 0,
        batch_size: int = 256,
        told: Told = lambda done, total: None,
    ) -> TextEvaluation:
        """Exact bits per character of a network of text that was trained without noise.

        Arguments are those of `evaluate`.

        Raises:
            ValueError: the model is none of text, or has several blocks, or samples is not 1 or
                more.
        """
        if self.text is None or len(list(self)) > 1:
            raise ValueError(
                f"a network without noise must be one block of a model of text, got {self._name} "
                f"in {len(list(self))} blocks"
            )
        was_training = self.training
        self.eval()
        try:
            how = {"seed": seed, "batch_size": batch_size}
            return conventional_bits(self, self._reading(data, samples, told, **how))
        finally:
            self.train(was_training)

    @property
    def _name(self) -> str:
        return type(self.model).__name__

    @staticmethod
    def _reading(
        data: Data, samples: int | None, told: Told, *, seed: int, batch_size: int
    ) -> Reading:
        windows = WINDOWS if samples is None else samples
        check_number("samples", windows, 1)
        # data without windows of text is refused there by name
        return Reading(cast(TextData, data), windows, seed, batch_size, Passes(told))

    def _evaluate(
        self,
        data: Data,
        levels: int | Sequence[float],
        start: Start,
        starts: int,
        passes: Passes,
        at: dict[str, int],
    ) -> Evaluation:
        """Losses of the blocks, and what the family measures after every step of a sampler."""
        self.check_starts(start, starts)
        grid = self.process.grid(levels, "cdf") if isinstance(levels, int) else levels
        grid = grid if self.metrics else ()
        in_steps = starts * len(grid)  # passes of a sample
        passes.total = len(data) * (LEVELS_PER_BLOCK * len(list(self)) + 1 + in_steps)
        losses = []
        shares = torch.arange(0.5, LEVELS_PER_BLOCK, dtype=torch.float64) / LEVELS_PER_BLOCK
        for block in self:
            quantiles = self.process.level_at(block.noise, shares).tolist()
            each = [self._loss_at(data, level, passes, **at) for level in quantiles]
            losses.append(sum(each) / len(each))
        highest = self._loss_at(data, self.process.range.high, passes, **at)

        def of_steps(batch: Batch, draw: Draw) -> list[Tensor]:
            runs = self._of_starts(batch, grid, draw, start=start, starts=starts)
            passes.made(len(runs[0][0]) * in_steps)
            single = [run[-1] for run in runs] if starts > 1 else []
            return [*self._mean(runs), *single]

        measured = self._measured(data, of_steps, **at) if grid else {}
        steps = len(grid)
        after = {name: values[:steps] for name, values in measured.items()}
        single = {name: values[steps:] for name, values in measured.items() if starts > 1}
        return Evaluation(tuple(losses), highest, tuple(grid), after, single)

    def _measured(
        self, data: Data, of_steps: Callable[..., list[Tensor]], *, seed: int, batch_size: int
    ) -> dict[str, tuple[float, ...]]:
        """Means of the family's own numbers after each step, by name, and what calibration is."""
        assert self.metrics is not None
        totals: dict[str, list[float]] = {}
        answers: dict[int, list[Tensor]] = {}  # by step: confidence and accuracy, (2, B) float64
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            predictions = of_steps(batch, draw=draw)
            for step, prediction in enumerate(predictions):
                found = self.metrics(prediction, batch)
                for name, numbers in found.items():
                    total = totals.setdefault(name, [0.0] * len(predictions))
                    total[step] += float(numbers.sum())
                if "confidence" in found and "accuracy" in found:
                    answer = torch.stack([found["confidence"], found["accuracy"]])
                    answers.setdefault(step, []).append(answer.double().cpu())
        means = {name: tuple(x / len(data) for x in each) for name, each in totals.items()}
        if answers:
            errors = (error_of_bins(*torch.cat(parts, dim=1)) for parts in answers.values())
            means["calibration_error"] = tuple(errors)
        return means
