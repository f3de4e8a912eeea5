"""From trained blocks to samples and figures: each level is denoised by the block that serves it.

arXiv:2506.14202, section 3.3 and the published code: N levels are N evaluations of one block each.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch, Data
from dbkernels.diffusion.process import Process
from dbkernels.diffusion.samplers import SAMPLERS, Denoiser, Sampler, euler, guided
from dbkernels.ops.philox import Draw, normals
from dbkernels.training.evaluation import LEVELS_PER_BLOCK, Evaluation, Means, batches
from dbkernels.training.partition import Block, block_at


class BlockInference(nn.Module):
    """What blocks do together; `DiffusionBlocks` says which blocks there are."""

    process: Process
    model: nn.Module
    metrics: Callable[[Tensor, Batch], dict[str, Tensor]] | None = None

    def __getitem__(self, index: int) -> Block:
        raise NotImplementedError

    def __iter__(self) -> Iterator[Block]:
        raise NotImplementedError

    def of(self, block: Block) -> nn.Module:
        """The model that a block trains and serves with."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    def predict(self, batch: Batch, z: Tensor, level: float) -> Tensor:
        """Prediction of the block that serves a level, in the family's own form.

        Args:
            batch:  what the family conditions on
            z:      (B, ...) float32
            level:  one for the whole batch
        """
        block = block_at(self, level)
        model = self.of(block)
        levels = torch.full(model.level_shape(batch), level, device=z.device)
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
    def predictions(self, batch: Batch, levels: Sequence[float], draw: Draw) -> list[Tensor]:
        """The prediction after each Euler step, from pure noise; a classifier's last one answers.

        Args:
            batch:   what the family conditions on
            levels:  descending
            draw:    names the start
        Returns:
            One for each level, in the family's own form.
        """
        found: list[Tensor] = []
        euler(self.denoiser(batch, found.append), self._start(batch, levels[0], draw), levels)
        return found

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
            sampler:   euler, or heun
        Returns:
            (B, ...) float32, in the range of the training data.
        Raises:
            ValueError: the sampler is unknown, a condition is one that the family does not have, or
                the family cannot do without a condition, and guidance is not 1.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler}")
        z = self._start(batch, levels[0], draw)
        denoiser = self.denoiser(batch)
        if guidance != 1:
            without = getattr(self.model, "unconditional", None)
            if without is None:
                name = type(self.model).__name__
                raise ValueError(f"guidance must be 1 for {name}, got {guidance}")
            denoiser = guided(denoiser, self.denoiser(without(batch)), guidance)
        return SAMPLERS[sampler](denoiser, z, levels)

    def _start(self, batch: Batch, level: float, draw: Draw) -> Tensor:
        """A noisy sample at the first level of a sampler."""
        B, *rest = self.model.z_shape(batch)
        noise = normals(draw, B, torch.Size(rest).numel(), self.device).view(B, *rest)
        return self.process.start(noise, level, self.model.sigma_data)

    @torch.no_grad()
    def loss_at(self, data: Data, level: float, *, seed: int = 0, batch_size: int = 256) -> float:
        """Mean loss over the data at one noise level, by the block that serves it, unweighted.

        At the highest level z holds nothing of the target, so there the loss cannot be won by
        copying it.
        """
        block, means = block_at(self, level), Means()
        model = self.of(block)
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            levels = torch.full(model.level_shape(batch), level, device=self.device)
            means.add("loss", model.losses(draw, levels, block.layers, batch))
        return means["loss"]

    def evaluate(
        self, data: Data, *, levels: int | Sequence[float] = 3, seed: int = 0, batch_size: int = 256
    ) -> Evaluation:
        """Losses of the blocks on some data, and what the family measures after every step.

        Args:
            data:        such as `open_data` gives
            levels:      of the sampler, or how many of equal probability; the family's own numbers
                         are read after each
            seed:        of the noise
            batch_size:  samples at a time; it does not change the noise that they get
        Raises:
            ValueError: levels is below 2, or the data is not what the model was trained on.
        """
        was_training = self.training
        self.eval()
        try:
            at, losses = {"seed": seed, "batch_size": batch_size}, []
            shares = torch.arange(0.5, LEVELS_PER_BLOCK, dtype=torch.float64) / LEVELS_PER_BLOCK
            for block in self:
                quantiles = self.process.level_at(block.noise, shares).tolist()
                losses.append(sum(self.loss_at(data, x, **at) for x in quantiles) / len(quantiles))
            highest = self.loss_at(data, self.process.range.high, **at)
            grid = self.process.grid(levels, "cdf") if isinstance(levels, int) else levels
            grid = grid if self.metrics else ()
            return Evaluation(tuple(losses), highest, tuple(grid), self._measured(data, grid, **at))
        finally:
            self.train(was_training)

    def _measured(
        self, data: Data, grid: Sequence[float], *, seed: int, batch_size: int
    ) -> dict[str, tuple[float, ...]]:
        """Means of the family's own numbers after each step, by name."""
        steps = [Means() for _ in grid]
        if not steps:
            return {}
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            for means, prediction in zip(steps, self.predictions(batch, grid, draw), strict=True):
                for name, numbers in self.metrics(prediction, batch).items():
                    means.add(name, numbers)
        return {name: tuple(means[name] for means in steps) for name in steps[0]}
