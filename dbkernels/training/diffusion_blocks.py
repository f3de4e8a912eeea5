"""A model cut into blocks: what each is trained on, and what they share.

    loss of a block = E over its levels of weight(level) * loss(level)

arXiv:2506.14202, section 3.3 and equation 6. N levels of a sampler are N evaluations of one block
each, as in the published code. That code trains one stem, table and head with every block's steps;
the paper's text lets no parameter be shared. Both are here: `sharing`.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch, Data
from dbkernels.diffusion.process import Process, Scheme
from dbkernels.diffusion.samplers import SAMPLERS, Denoiser, Sampler, euler, guided
from dbkernels.models.family import WEIGHTINGS, Weighting
from dbkernels.models.registry import family_of
from dbkernels.ops.philox import Draw, normals, uniforms
from dbkernels.settings import check_choice
from dbkernels.training.evaluation import LEVELS_PER_BLOCK, Evaluation, batches
from dbkernels.training.partition import Block, block_at, partition

Sharing = Literal["joint", "copies"]
Parameters = dict[str, nn.Parameter]
SHARED = "shared"  # name of the group that the steps of several blocks update


def own_group(block: Block) -> str:
    """Name of the group that the steps of one block alone update."""
    return f"block{block.index}"


class DiffusionBlocks(nn.Module):
    """A model, its blocks, and their noise; iterating gives the blocks, the most noise first.

    With copies, every block has a stem and a head of its own. Layers exist once in either case, and
    so do the parts that make the clean target. With copies those are frozen: blocks that pass z
    from one to the next must agree on what z means, and no block may move it under the others.

    Args:
        model:       a family; it serves block 0 itself, and every block where sharing is joint
        num_blocks:  1 trains end to end
        process:     the noise; None is the family's own
        weighting:   of the levels in the loss; None is the family's own. none: the plain mean. edm:
                     mean(weight * loss), right for squared errors. normalised: the same over the
                     mean weight of the block, so that no block outweighs another. published:
                     mean(weight) * mean(loss), what the authors' code does; alone of the four it
                     depends on how a batch is cut
        layers:      indices of layers in running order, which may repeat; the first meet the most
                     noise. None is each once, in order
        split:       layers of each block, the noisiest first; None splits evenly, and a remainder
                     goes one layer each to the first blocks
        scheme:      how the process cuts its range
        gamma:       overlap of neighbouring blocks, as a share of each one's own width
        sharing:     joint, or copies
    Raises:
        ValueError: a setting is unknown or does not fit the model, a layer with copies would be
            trained by two blocks, or the model is of no known family and process or weighting is
            None.
    """

    def __init__(
        self,
        model: nn.Module,
        num_blocks: int = 3,
        *,
        process: Process | None = None,
        weighting: Weighting | None = None,
        layers: Sequence[int] | None = None,
        split: Sequence[int] | None = None,
        scheme: Scheme = "equal_probability",
        gamma: float = 0.05,
        sharing: Sharing = "joint",
    ):
        super().__init__()
        self.process, self.weighting, self.metrics = process, weighting, None
        if entry := family_of(model):
            self.process, self.weighting = process or entry.process, weighting or entry.weighting
            self.metrics = entry.metrics
        if self.process is None:
            raise ValueError(
                f"process must be given for {type(model).__name__}, which is of no known family, "
                "got None"
            )
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("sharing", sharing, ("joint", "copies"))
        depth = range(len(model.layers))
        order = tuple(depth if layers is None else layers)
        if not set(order) <= set(depth):
            raise ValueError(f"layers must be 0 to {depth[-1]}, got {list(order)}")
        self._blocks = partition(
            order, num_blocks, self.process, split=split, scheme=scheme, gamma=gamma
        )
        self.model = model
        self.copies = nn.ModuleList()
        if sharing == "copies" and num_blocks > 1:
            self._copy()

    def _copy(self) -> None:
        owners = Counter(index for block in self._blocks for index in set(block.layers))
        index, times = owners.most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"with copies a layer must be in one block, got layer {index} in several"
            )
        target_parts = [getattr(self.model, name) for name in self.model.target_parts]
        for part in target_parts:
            part.requires_grad_(False)
        once = {id(part): part for part in (self.model.layers, *target_parts)}
        self.copies.extend(copy.deepcopy(self.model, dict(once)) for _ in self._blocks[1:])

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return self._blocks[index]

    def of(self, block: Block) -> nn.Module:
        """The model that a block trains and serves with."""
        return self.copies[block.index - 1] if self.copies and block.index else self.model

    def groups(self) -> dict[str, Parameters]:
        """Trainable parameters by the steps that update them: each block's own, and the shared.

        Every parameter is in one group, under its name in `named_parameters`. A layer that several
        blocks run is shared.
        """
        own, shared = self._read(trained=True)
        return {**own, SHARED: shared} if shared else own

    def frozen(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that no step updates, by the group of the block whose steps read them.

        One that several blocks read is in none.
        """
        own, _ = self._read(trained=False)
        return {group: list(parameters.values()) for group, parameters in own.items()}

    def _read(self, *, trained: bool) -> tuple[dict[str, Parameters], Parameters]:
        """What the steps of one block alone read, by its group, and those of several."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad == trained]
        read = {}
        for block in self:
            model = self.of(block)
            running = {id(p) for index in block.layers for p in model.layers[index].parameters()}
            idle = {id(p) for p in model.layers.parameters()} - running
            every = {id(p) for p in model.parameters()} - idle
            read[own_group(block)] = {name: p for name, p in named if id(p) in every}
        times = Counter(name for parameters in read.values() for name in parameters)
        own = {g: {n: p for n, p in found.items() if times[n] == 1} for g, found in read.items()}
        return own, {n: p for found in read.values() for n, p in found.items() if times[n] > 1}

    def loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        """Loss of one block, () float32: its gradient reaches its layers and what blocks share.

        Args:
            block:  drawn once per batch
            batch:  of B samples
            draw:   names the noise levels and the noise
        """
        model = self.of(block)
        shape, device = model.level_shape(batch), next(iter(batch.values())).device
        level = self.process.level_at(block.trained_noise, uniforms(draw, *shape, device=device))
        # a weight over its own inverse is then 1 when it is rounded
        scale = self._scale(block, level.double())
        return model.loss(draw, level, scale, block.layers, batch)

    def _scale(self, block: Block, level: Tensor) -> Tensor:
        """What the loss at each level counts for in the block's loss."""
        share = 1 / max(level.numel(), 1)
        if self.weighting == "none":
            return torch.full_like(level, share)
        weight = self.process.weight(level, self.model.sigma_data)
        if self.weighting == "normalised":
            share /= self.process.mean_weight(block.trained_noise, self.model.sigma_data)
        if self.weighting == "published":
            weight = weight.mean().expand_as(level)
        return weight * share

    # together: each level is denoised by the block that serves it

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
        check_choice("sampler", sampler, SAMPLERS)
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
        block, total = block_at(self, level), 0.0
        model = self.of(block)
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            shape = model.level_shape(batch)
            levels = torch.full(shape, level, dtype=torch.float32, device=self.device)
            total += float(model.losses(draw, levels, block.layers, batch).sum())
        return total / len(data)

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
        totals: dict[str, list[float]] = {}
        if not grid:
            return {}
        for batch, draw in batches(data, batch_size, self.device, seed=seed):
            for step, prediction in enumerate(self.predictions(batch, grid, draw)):
                for name, numbers in self.metrics(prediction, batch).items():
                    totals.setdefault(name, [0.0] * len(grid))[step] += float(numbers.sum())
        return {name: tuple(x / len(data) for x in each) for name, each in totals.items()}


@torch.no_grad()
def load_weights(blocks: DiffusionBlocks, weights: dict[str, Tensor]) -> None:
    """Copy weights into blocks made with the same configuration.

    Names that `weights` lacks keep their values: a moving average has none of what is frozen.

    Raises:
        ValueError: a name is unknown or a shape differs.
    """
    parameters = dict(blocks.named_parameters())
    for name, tensor in weights.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if shape != tuple(tensor.shape):
            raise ValueError(f"weight {name} must be {shape}, got {tuple(tensor.shape)}")
        parameters[name].copy_(tensor)
