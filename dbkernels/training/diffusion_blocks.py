"""A model cut into blocks: what each is trained on, and what they share.

    loss of a block = E over its levels of weight(level) * loss(level)

arXiv:2506.14202, section 3.3 and equation 6. N levels of a sampler are N evaluations of one block
each, as in the published code. That code trains one stem, table and head with every block's steps;
the paper's text lets no parameter be shared. Both are here: `sharing`.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.diffusion.process import NoiseOrder, Process, Scheme
from dbkernels.models.absent import absent_copy, to_meta
from dbkernels.models.family import WEIGHTINGS, FamilyModule, Weighting
from dbkernels.models.registry import family_of
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice, check_number
from dbkernels.training.evaluated import Evaluated
from dbkernels.training.partition import Block, partition
from dbkernels.training.saved import require_tensors

Sharing = Literal["joint", "copies"]
Parameters = dict[str, nn.Parameter]
Predict = Callable[[Tensor, Tensor, Batch], Tensor]
SHARED = "shared"  # name of the group that the steps of several blocks update


def own_group(block: Block) -> str:
    """Name of the group that the steps of one block alone update."""
    return f"block{block.index}"


class DiffusionBlocks(Evaluated):
    """A model, its blocks, and their noise; iterating gives the blocks, the most noise first.

    `trained` are those of them that are trained here, in the same order.

    With copies, every block has a stem and a head of its own. Layers exist once in either case, and
    so do the parts that make the clean target. With copies those are frozen: blocks that pass z
    from one to the next must agree on what z means, and no block may move it under the others.

    Args:
        model:       a family; it serves block 0 itself, and every block where sharing is joint
        num_blocks:  1 trains end to end
        process:     the noise, on the path of the model; None is the family's own
        weighting:   of the levels in the loss; None is the family's own. none: the plain mean.
                     process: mean(weight * loss), with the weight that makes a squared error one
                     of what the network predicts, which is that of EDM for EDM, or with that of the
                     bound for masked tokens. normalised: the same over
                     the mean weight of the block, so that no block outweighs another. published:
                     mean(weight) * mean(loss), what the authors' code does; alone of the four it
                     depends on how a batch is cut
        layers:      indices of layers in running order, which may repeat. None is each once, in
                     order
        split:       layers of each block, the noisiest first; None splits evenly, and a remainder
                     goes one layer each to the noisiest blocks
        scheme:      how the process cuts its range
        gamma:       overlap of neighbouring blocks, as a share of each one's own width
        sharing:     joint, or copies, which need blocks that read no layer of each other
        noise_order: which end of the stack meets the most noise: the first layers, or the deepest
        only:        index of the one block that is trained here, with copies; None is all. What
                     belongs to the others alone is taken out of memory
    Raises:
        ValueError: a setting is unknown or does not fit the model, the process is on another path
            than the model, a layer with copies would be trained by two blocks, or the model is of
            no known family and process or weighting is None.
    """

    def __init__(
        self,
        model: FamilyModule,
        num_blocks: int = 3,
        *,
        process: Process | None = None,
        weighting: Weighting | None = None,
        layers: Sequence[int] | None = None,
        split: Sequence[int] | None = None,
        scheme: Scheme = "equal_probability",
        gamma: float = 0.05,
        sharing: Sharing = "joint",
        noise_order: NoiseOrder = "first",
        only: int | None = None,
    ):
        super().__init__()
        self.weighting = weighting
        if entry := family_of(model):
            process = process or entry.process_of(model.config)
            self.weighting = weighting or entry.weighting
            self.metrics, self.average, self.text = entry.metrics, entry.average, entry.text
        elif own := getattr(model, "defaults", None):
            process, self.weighting = process or own.process, weighting or own.weighting
            self.metrics, self.average = own.metrics, own.average
        if process is None:
            raise ValueError(
                f"process must be given for {type(model).__name__}, which is of no known family, "
                "got None"
            )
        self.process = process
        path = model.prediction and model.prediction.path
        if self.process.path != path:
            raise ValueError(
                f"process must be on the path of the model, {path or 'that of tokens'}, "
                f"got {self.process}"
            )
        check_choice("weighting", self.weighting, WEIGHTINGS)
        check_choice("sharing", sharing, ("joint", "copies"))
        depth = range(len(model.layers))
        order = tuple(depth if layers is None else layers)
        if not set(order) <= set(depth):
            raise ValueError(f"layers must be 0 to {depth[-1]}, got {list(order)}")
        cut: dict[str, Any] = {"split": split, "scheme": scheme, "gamma": gamma}
        cut["noise_order"] = noise_order
        self._blocks = partition(order, num_blocks, self.process, **cut)
        # those whose layers come first may be read by others
        running_order = self._blocks[:: 1 if noise_order == "first" else -1]
        if only is not None:
            check_number("block", only, 0, num_blocks - 1)
            if sharing == "joint" and num_blocks > 1:
                raise ValueError(
                    "sharing must be copies for a block that is trained alone, got joint"
                )
            running_order = (self._blocks[only],)
        self.in_running_order = [block.index for block in running_order]
        self.trained = [self._blocks[index] for index in sorted(self.in_running_order)]
        self.model = model
        self.copies = nn.ModuleList()
        if sharing == "copies" and num_blocks > 1:
            if not model.independent:
                raise ValueError(
                    "sharing must be joint where a block's steps read layers of others, got copies"
                )
            self._copy(only)

    def _copy(self, only: int | None) -> None:
        owners = Counter(index for block in self._blocks for index in set(block.layers))
        index, times = owners.most_common(1)[0]
        if times > 1:
            raise ValueError(
                f"with copies a layer must be in one block, got layer {index} in several"
            )
        target_parts = [getattr(self.model, name) for name in self.model.target_parts]
        for part in target_parts:
            part.requires_grad_(False)
        common = self.model.layers, *target_parts
        for block in self._blocks[1:]:
            if only in (None, block.index):
                once = {id(part): part for part in common}
                self.copies.append(copy.deepcopy(self.model, once))
            else:
                self.copies.append(absent_copy(self.model, common))
        if only is None:
            return
        if only:
            to_meta(self.model, but=common)
        owner = {index: block.index for block in self._blocks for index in block.layers}
        for index, layer in enumerate(self.model.layers):
            # what no block runs is in the checkpoints of the first
            if owner.get(index, 0) != only:
                to_meta(layer)

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks)

    def __getitem__(self, index: int) -> Block:
        return self._blocks[index]

    def of(self, block: Block) -> FamilyModule:
        """The model that a block trains and serves with."""
        return self.copies[block.index - 1] if self.copies and block.index else self.model

    def groups(self) -> dict[str, Parameters]:
        """Trainable parameters by the steps that update them: each block's own, and the shared.

        Every one that a step reads is in one group, under its name in `named_parameters`. A layer
        that several blocks run is shared.
        """
        own, shared = self._read(trained=True)
        return {**own, SHARED: shared} if shared else own

    def frozen(self) -> dict[str, list[nn.Parameter]]:
        """Parameters that no step updates, by the group of the block whose steps read them.

        One that several blocks read is in none.
        """
        own, _ = self._read(trained=False)
        return {group: list(parameters.values()) for group, parameters in own.items()}

    def idle(self) -> list[nn.Parameter]:
        """Parameters of layers that no block runs, which no step reads."""
        read = set().union(*self._by_block().values())
        return [p for p in self.parameters() if id(p) not in read]

    def _by_block(self) -> dict[str, set[int]]:
        """Of what the steps of each block read, by its group: its layers, and all in no layer."""
        parts: dict[int, tuple[list[set[int]], set[int]]] = {}
        found = {}
        for block in self.trained:
            model = self.of(block)
            if id(model) not in parts:  # one walk through a large model, not one for each block
                layers = [set(map(id, layer.parameters())) for layer in model.layers]
                parts[id(model)] = layers, set(map(id, model.parameters())).difference(*layers)
            layers, outside = parts[id(model)]
            found[own_group(block)] = outside.union(*(layers[index] for index in block.layers))
        return found

    def _read(self, *, trained: bool) -> tuple[dict[str, Parameters], Parameters]:
        """What the steps of one block alone read, by its group, and those of several."""
        named = [(n, p) for n, p in self.named_parameters() if p.requires_grad == trained]
        read = {
            group: {name: p for name, p in named if id(p) in every}
            for group, every in self._by_block().items()
        }
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
        level, scale = self._levels(block, batch, draw)
        given = level, scale, block.layers, batch
        return self.of(block).loss(draw, *given, block.trained_noise)

    def taught_loss(
        self, block: Block, batch: Batch, draw: Draw, predict: Predict, share: float
    ) -> Tensor:
        """Loss of one block, () float32, of whose target a share is what a teacher predicts.

        Args:
            predict:  (z, levels, batch) -> prediction, in the family's form and without gradient
            share:    from 0 to 1
        The others are those of `loss`, which has the same levels and noise.
        """
        model, (level, scale) = self.of(block), self._levels(block, batch, draw)
        z = model.noisy(level, batch, draw)
        taught = predict(z.detach(), level, batch)
        return model.taught_loss(z, taught, share, level, scale, block.layers, batch)

    def conventional_loss(self, block: Block, batch: Batch, draw: Draw) -> Tensor:
        """Loss () float32 of the layers of a block as such a network is trained without noise.

        Only where the family has one; arguments as for `loss`.
        """
        return self.of(block).conventional_loss(draw, block.layers, batch)

    def _levels(self, block: Block, batch: Batch, draw: Draw) -> tuple[Tensor, Tensor]:
        """Levels that a draw names, float32, and what the loss at each counts for, float64."""
        shape = self.of(block).level_shape(batch)
        quantiles = self.process.quantiles(draw, shape, next(iter(batch.values())).device)
        level = self.process.level_at(block.trained_noise, quantiles)
        # a weight over its own inverse is then 1 when it is rounded
        return level, self._scale(block, level.double())

    def _scale(self, block: Block, level: Tensor) -> Tensor:
        """What the loss at each level counts for in the block's loss."""
        share = 1 / max(level.numel(), 1)
        if self.weighting == "none":
            return torch.full_like(level, share)
        weight = self.process.weight(level, self.model.prediction)
        if self.weighting == "normalised":
            share /= self.process.mean_weight(block.trained_noise, self.model.prediction)
        if self.weighting == "published":
            weight = weight.mean().expand_as(level)
        return weight * share


@torch.no_grad()
def load_weights(blocks: DiffusionBlocks, weights: dict[str, Tensor]) -> None:
    """Copy weights into blocks made with the same configuration.

    Names that `weights` lacks keep their values: a moving average has none of what is frozen.

    Raises:
        ValueError: a name is unknown, or a shape or dtype differs, or a weight is not finite.
    """
    parameters = dict(blocks.named_parameters())
    require_tensors(weights, parameters, "weights", some=True)
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)
