"""The loop: draw a block, step it.

No gradient crosses blocks, and everything random in a step is a function of (seed, block, the
block's own step): where blocks share no parameter, training them in any order or interleaving
gives the same bits.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor, nn

from dbkernels.models.family import Batch
from dbkernels.ops.philox import Draw
from dbkernels.training.data import ImageData, batch_indices
from dbkernels.training.micro_batch import MicroBatch
from dbkernels.training.part import Part
from dbkernels.training.partition import Block
from dbkernels.training.randomness import stream_seed
from dbkernels.training.residency import open_residency
from dbkernels.training.schedule import learning_rate
from dbkernels.training.sharing import SHARED, BlockModels, load_weights
from dbkernels.training.trainer_config import TrainerConfig
from dbkernels.training.visits import Visits

Objective = Callable[[nn.Module, Block, Batch, Draw], Tensor]
Augment = Callable[[Batch, Draw], Batch]


class Trainer:
    """Trains the blocks of a model.

    Args:
        models:     a family's blocks, on the device; on the host where blocks visit it one by one
        data:       gives batches by sample index
        objective:  (model, block, batch, draw) -> scalar loss, a mean over the batch
        config:     see `TrainerConfig`
        augment:    (batch, draw) -> batch, applied to every batch that is drawn
        device:     to train on; None is where the models are
    Raises:
        ValueError: all blocks are to be resident on another device than the models are on, or the
                    directory in which blocks are to rest has no room for them.
    """

    def __init__(
        self,
        models: BlockModels,
        data: ImageData,
        objective: Objective,
        config: TrainerConfig,
        *,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
    ):
        self.models, self.blocks = models.train(), models.blocks
        self.data, self.objective, self.config, self.augment = data, objective, config, augment
        self.device = _device(models, config, device)
        self.step = 0
        self.visits = Visits(config, len(self.blocks))
        self.micro_batch = MicroBatch(config.batch_size // config.accumulate, config.batch_size)
        self.residency = open_residency(models, self.device, config)
        self.parts: dict[str, Part] = {}
        for name, parameters in self.models.parts().items():
            total = self.total_steps if name == SHARED else config.steps
            self.parts[name] = part = Part(
                parameters, total=total, weight_decay=config.weight_decay, ema=config.ema
            )
            if config.resident == "block":
                self.residency.adopt(name, part)

    @property
    def total_steps(self) -> int:
        """Steps of the run: those of every block."""
        return self.config.steps * len(self.blocks)

    def next_block(self) -> Block:
        """The block that the run's next step trains."""
        return self.blocks[self.visits.block(self.step)]

    def run(self) -> None:
        """Train to the end, without a log or a checkpoint."""
        while self.step < self.total_steps:
            self.step_block(self.next_block())
        self.close()

    def close(self) -> None:
        """Free the device of what was brought there from the host; a step brings it back."""
        self.residency.close()

    def step_block(self, block: Block) -> dict[str, float | int]:
        """One update of one block and of what it shares.

        Returns:
            The step of the run, block, the block's own step, loss, norm of the gradient, and rate.
            Also the steps of a visit or the size of a micro-batch where this step has set it.
        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing was updated.
            torch.OutOfMemoryError: half the micro-batch is too much too; nothing was updated.
        """
        begin, micro_batch = perf_counter(), self.micro_batch.size
        own, *_ = moved = self.moved(block)
        lr, row = self._rate(own), {"step": self.step, "block": block.index}
        numbers = self.advance(block)
        if (following := self.visits.next_block(self.step)) is not None:
            self.residency.prefetch(_own(self.blocks[following]))
        loss, norm = (float(number) for number in numbers)
        if not math.isfinite(loss + norm):
            raise FloatingPointError(_not_finite(loss, norm, block, own.steps))
        row |= {"block_step": own.steps, "loss": loss, "grad_norm": norm, "lr": lr}
        for part in moved:
            part.steps += 1
        self.step += 1
        if self.micro_batch.size != micro_batch:
            row["micro_batch"] = self.micro_batch.size
        if self.visits.timed(self.step, perf_counter() - begin, self.residency.swap_seconds):
            row["visit"] = self.visits.length
        return row

    def advance(self, block: Block) -> tuple[Tensor, Tensor]:
        """The device's share of a step, of which nothing is read back; no count moves.

        Returns:
            Loss and norm of the gradient, (). Where one is not finite, nothing was updated.
        """
        self.residency.enter(_own(block))
        moved = self.moved(block)
        # a step that something else cut short, such as a broken image, has left its own
        _drop_gradients(moved)
        loss = self.micro_batch.attempt(
            partial(self._accumulate, block, moved[0].steps),
            partial(_drop_gradients, moved),
            f"block {block.index} at its step {moved[0].steps}",
        )
        parameters = [p for part in moved for p in part.parameters.values()]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip or torch.inf)
        finite = torch.isfinite(loss + norm)
        for part in moved:
            part.update(self._rate(part), where=finite)
        return loss, norm

    def moved(self, block: Block) -> list[Part]:
        """What a step on a block updates: its own part, and the shared one if there is one."""
        names = _own(block), SHARED
        return [self.parts[name] for name in names if name in self.parts]

    def _accumulate(self, block: Block, block_step: int, micro_batch: int) -> Tensor:
        """Backward of the mean loss over the block's next batch; the loss, detached."""
        config = self.config
        indices = batch_indices(
            len(self.data), config.batch_size, seed=config.seed, block=block.index, step=block_step
        )
        draw = Draw(stream_seed(config.seed, block.index), block_step)
        total = torch.zeros((), device=self.device)
        for piece in indices.split(micro_batch):
            batch = self.data.batch(piece, self.device)
            if self.augment:
                batch = self.augment(batch, draw)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast):
                loss = self.objective(self.models.of(block), block, batch, draw)
            loss = loss / (len(indices) / len(piece))
            loss.backward()
            total += loss.detach()
            draw = replace(draw, sample=draw.sample + len(piece))
        return total

    def _rate(self, part: Part) -> float:
        config = self.config
        # the shared parts see every block's steps, so their warm-up is as many times longer
        warmup = config.warmup * part.total // config.steps
        return learning_rate(
            part.steps, part.total, lr=config.lr, warmup=warmup, decay=config.decay
        )

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Everything that a checkpoint must hold: weights, their average, optimizer state."""
        parts = self.parts.values()
        self.residency.wait()
        weights = {name: p.detach() for name, p in self.models.named_parameters()}
        average = {name: tensor for part in parts for name, tensor in part.average.items()}
        optimizer = {k: v for part in parts for k, v in part.optimizer_tensors().items()}
        groups = {"model": weights, "ema": average, "optimizer": optimizer}
        return {group: tensors for group, tensors in groups.items() if tensors}

    def counters(self) -> dict[str, int | dict[str, int]]:
        """The counts of steps, and what was found out on the way, that a checkpoint must hold."""
        steps = {name: part.steps for name, part in self.parts.items()}
        found = {"visit": self.visits.length, "micro_batch": self.micro_batch.size}
        return {"step": self.step, "parts": steps, **found}

    def restore(self, tensors: dict[str, dict[str, Tensor]], counters: dict) -> None:
        """Go on from what `tensors` and `counters` once gave, bit for bit."""
        self.residency.settle()
        load_weights(self.models, tensors["model"])
        for name, part in self.parts.items():
            steps = counters["parts"][name]
            part.restore(steps, tensors.get("ema", {}), tensors.get("optimizer", {}))
        self.step, self.visits.length = counters["step"], counters["visit"]
        self.micro_batch.size = counters["micro_batch"]


def _device(
    models: BlockModels, config: TrainerConfig, device: torch.device | str | None
) -> torch.device:
    home = next(models.parameters()).device
    # tensors on "cuda" say "cuda:0"
    device = home if device is None else torch.empty(0, device=device).device
    if config.resident == "all" and device != home:
        raise ValueError(f"models must be on {device}, where all blocks are resident, got {home}")
    return device


def _own(block: Block) -> str:
    """Name of a block's own part."""
    return f"block{block.index}"


def _drop_gradients(parts: list[Part]) -> None:
    for part in parts:
        part.optimizer.zero_grad()


def _not_finite(loss: float, norm: float, block: Block, block_step: int) -> str:
    noise = block.trained_noise
    return (
        f"the loss must be finite, got loss {loss} and gradient norm {norm} in "
        f"block {block.index} at its step {block_step} with sigma in "
        f"[{noise.low:.6g}, {noise.high:.6g}]; nothing was updated"
    )
