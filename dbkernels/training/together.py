"""What trained blocks do together: each noise level is denoised by the block that serves it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.path import Path
from dbkernels.diffusion.process import Process
from dbkernels.diffusion.samplers import SAMPLERS, Denoiser, Sampler, euler, guided
from dbkernels.models.family import FamilyModule
from dbkernels.ops.philox import Draw, normals
from dbkernels.settings import check_choice, check_number
from dbkernels.training.partition import Block, block_at

Start = Literal["zero", "noise"]  # of the steps that lead to an answer
MOST_STARTS = 1000


class Together(nn.Module):
    """Blocks in the order of their noise, which predict and sample as one.

    model:    of block 0
    process:  the noise
    metrics:  (prediction, batch) -> numbers (B,) of the samples, by name; None has none
    average:  predictions of several starts (N, B, ...) -> one; None where they have no mean
    """

    model: FamilyModule
    process: Process
    metrics: Callable[[Tensor, Batch], dict[str, Tensor]] | None = None
    average: Callable[[Tensor], Tensor] | None = None

    def __iter__(self) -> Iterator[Block]:
        """The blocks, the most noise first."""
        raise NotImplementedError

    def of(self, block: Block) -> FamilyModule:
        """The model that a block serves with."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are, but for those that are in no memory."""
        there = (p.device for p in self.parameters() if not p.is_meta)
        return next(there, torch.device("meta"))

    def predict(self, batch: Batch, z: Tensor, level: float) -> Tensor:
        """Prediction of the block that serves a level, in the family's own form.

        Args:
            batch:  what the family conditions on
            z:      (B, ...) float32
            level:  one for the whole batch
        """
        block = block_at(self, level)
        model = self.of(block)
        levels = torch.full(model.level_shape(batch), level, dtype=torch.float32, device=z.device)
        return model.denoise(z, levels, block.layers, batch)

    def denoiser(
        self, batch: Batch, seen: Callable[[Tensor], None] = lambda prediction: None
    ) -> Denoiser:
        """What a sampler follows: at each level, the estimate of the block that serves it.

        Args:
            batch:  what the family conditions on
            seen:   called with every prediction
        """

        def denoiser(z: Tensor, level: float) -> Tensor:
            prediction = self.predict(batch, z, level)
            seen(prediction)
            return self.of(block_at(self, level)).estimate(prediction)

        return denoiser

    @torch.no_grad()
    def predictions(
        self,
        batch: Batch,
        levels: Sequence[float],
        draw: Draw,
        *,
        start: Start = "zero",
        starts: int = 1,
    ) -> list[Tensor]:
        """The prediction after each Euler step; a classifier's last one answers.

        From pure noise, as in the paper, the steps end at one draw from p(label | image). From
        z = 0, the mean of that noise, they end near its most likely label.

        Args:
            batch:   what the family conditions on
            levels:  descending
            draw:    names the noise
            start:   zero, or noise
            starts:  from noise: the probabilities of so many starts are averaged
        Returns:
            One for each level, in the family's own form.
        Raises:
            ValueError: a setting is unknown, or several starts are asked for from z = 0 or of a
                family whose predictions have no average.
        """
        return self._mean(self._of_starts(batch, levels, draw, start=start, starts=starts))

    def _of_starts(
        self, batch: Batch, levels: Sequence[float], draw: Draw, *, start: Start, starts: int
    ) -> list[list[Tensor]]:
        """As `predictions`, of each start alone."""
        self.check_starts(start, starts)
        runs: list[list[Tensor]] = [[] for _ in range(starts)]
        for k, found in enumerate(runs):
            if start == "zero":
                z = torch.zeros(self.model.z_shape(batch), dtype=torch.float32, device=self.device)
            else:
                z = self.start(batch, levels[0], replace(draw, step=draw.step + k))
            euler(self.denoiser(batch, found.append), z, levels, self._path)
        return runs

    def _mean(self, runs: list[list[Tensor]]) -> list[Tensor]:
        """Predictions after each step, of several starts."""
        if len(runs) == 1 or self.average is None:
            return runs[0]
        return [self.average(torch.stack(step)) for step in zip(*runs, strict=True)]

    def check_starts(self, start: Start, starts: int) -> None:
        """Refuse starts that `predictions` would refuse."""
        check_choice("start", start, get_args(Start))
        check_number("starts", starts, 1, MOST_STARTS)
        if starts > 1 and (start == "zero" or self.average is None):
            where = "from zero" if start == "zero" else f"for {type(self.model).__name__}"
            raise ValueError(f"starts must be 1 {where}, got {starts}")

    @torch.no_grad()
    def sample(
        self,
        batch: Batch,
        levels: Sequence[float],
        draw: Draw,
        *,
        guidance: float = 1.0,
        sampler: Sampler = "euler",
    ) -> Tensor:
        """Draw one sample for each condition of a batch.

        Args:
            batch:     what the family conditions on
            levels:    descending
            draw:      names the start; a sample depends on its own place in the draw alone
            guidance:  scale of classifier-free guidance; 1 for none
            sampler:   a key of SAMPLERS
        Returns:
            (B, ...) float32, in the range of the training data.
        Raises:
            ValueError: the sampler is unknown, a condition is one that the family does not have, or
                the family cannot do without a condition, and guidance is not 1.
        """
        check_choice("sampler", sampler, SAMPLERS)
        z = self.start(batch, levels[0], draw)
        denoiser = self.denoiser(batch)
        if guidance != 1:
            without = getattr(self.model, "unconditional", None)
            if without is None:
                name = type(self.model).__name__
                raise ValueError(f"guidance must be 1 for {name}, got {guidance}")
            denoiser = guided(denoiser, self.denoiser(without(batch)), guidance)
        return SAMPLERS[sampler].run(denoiser, z, levels, self._path)

    @property
    def _path(self) -> Path:
        """That samplers follow; tokens, which have none, are unmasked."""
        assert self.process.path is not None
        return self.process.path

    def start(self, batch: Batch, level: float, draw: Draw) -> Tensor:
        """A noisy sample at the first level of a sampler, of the shape that a batch asks for."""
        B, *rest = self.model.z_shape(batch)
        noise = normals(draw, B, torch.Size(rest).numel(), self.device).view(B, *rest)
        return self.process.start(noise, level, self.model.sigma_data)
