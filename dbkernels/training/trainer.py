"""The loop: draw a block, step it.

No gradient crosses blocks, and everything random in a step is a function of (seed, block, the
block's own step): where blocks share no parameter, training them in any order or interleaving
gives the same bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dbkernels.models.family import Batch
from dbkernels.ops.philox import Draw
from dbkernels.training.data import ImageData, batch_indices
from dbkernels.training.part import Part
from dbkernels.training.partition import Block
from dbkernels.training.randomness import stream_seed
from dbkernels.training.schedule import Decay, Order, block_index, learning_rate
from dbkernels.training.sharing import SHARED, BlockModels, Sharing

Objective = Callable[[nn.Module, Block, Batch, Draw], Tensor]
Augment = Callable[[Batch, Draw], Batch]


@dataclass(frozen=True)
class TrainerConfig:
    """How blocks are trained."""

    steps: int
    """Updates of every block."""
    batch_size: int = 128
    """Samples per update."""
    lr: float = 1e-3
    """Highest learning rate of AdamW."""
    warmup: int = 0
    """Updates over which the rate rises, in the block's own steps."""
    decay: Decay = "constant"
    """Of the rate after the warm-up, in the block's own steps."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on every parameter."""
    clip: float = 1.0
    """Largest norm of one update's gradient; 0 for no limit."""
    ema: float = 0.0
    """Decay of the moving average of the weights, in a block's own steps; 0 for none."""
    accumulate: int = 1
    """Parts that a batch is cut into, their gradients added up."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    sharing: Sharing = "joint"
    """What the stem and head are: joint, trained by all blocks, or copies, one for each block."""
    order: Order = "shuffled"
    """Shuffled visits every block once in each sweep; sequential finishes one after another."""
    seed: int = 0
    """Seed of everything random in the run."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("warmup", "weight_decay", "clip", "seed"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("lr", "weight_decay", "clip"):
            if getattr(self, name) == math.inf:
                raise ValueError(f"{name} must be finite, got {getattr(self, name)}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"accumulate must divide the batch size {self.batch_size}, got {self.accumulate}"
            )


class Trainer:
    """Trains the blocks of a model.

    Args:
        models:     a family's blocks, on the device that they are trained on
        data:       gives batches by sample index
        objective:  (model, block, batch, draw) -> scalar loss, a mean over the batch
        config:     see `TrainerConfig`
        augment:    (batch, draw) -> batch, applied to every batch that is drawn
    """

    def __init__(
        self,
        models: BlockModels,
        data: ImageData,
        objective: Objective,
        config: TrainerConfig,
        *,
        augment: Augment | None = None,
    ):
        self.models, self.blocks = models.train(), models.blocks
        self.data, self.objective, self.config, self.augment = data, objective, config, augment
        self.device = next(models.parameters()).device
        self.step = 0
        self.parts = {
            name: Part(
                parameters,
                total=self.total_steps if name == SHARED else config.steps,
                weight_decay=config.weight_decay,
                ema=config.ema,
            )
            for name, parameters in self.models.parts().items()
        }

    @property
    def total_steps(self) -> int:
        """Steps of the run: those of every block."""
        return self.config.steps * len(self.blocks)

    def next_block(self) -> Block:
        """The block that the run's next step trains."""
        config = self.config
        index = block_index(
            self.step, len(self.blocks), steps=config.steps, order=config.order, seed=config.seed
        )
        return self.blocks[index]

    def run(self) -> None:
        """Train to the end, without a log or a checkpoint."""
        while self.step < self.total_steps:
            self.step_block(self.next_block())

    def step_block(self, block: Block) -> dict[str, float | int]:
        """One update of one block and of what it shares.

        Returns:
            The step of the run, block, the block's own step, loss, norm of the gradient, and rate.
        Raises:
            FloatingPointError: the loss or its gradient is not finite; nothing was updated.
        """
        own, *_ = moved = self._moved(block)
        lr, row = self._rate(own), {"step": self.step, "block": block.index}
        loss, norm = (float(number) for number in self.advance(block))
        if not math.isfinite(loss + norm):
            raise FloatingPointError(_not_finite(loss, norm, block, own.steps))
        row |= {"block_step": own.steps, "loss": loss, "grad_norm": norm, "lr": lr}
        for part in moved:
            part.steps += 1
        self.step += 1
        return row

    def advance(self, block: Block) -> tuple[Tensor, Tensor]:
        """The device's share of a step, of which nothing is read back; no count moves.

        Returns:
            Loss and norm of the gradient, (). Where one is not finite, nothing was updated.
        """
        moved = self._moved(block)
        loss = self._accumulate(block, moved[0].steps)
        parameters = [p for part in moved for p in part.parameters.values()]
        norm = nn.utils.clip_grad_norm_(parameters, self.config.clip or torch.inf)
        finite = torch.isfinite(loss + norm)
        for part in moved:
            part.update(self._rate(part), where=finite)
        return loss, norm

    def _moved(self, block: Block) -> list[Part]:
        """What a step on a block updates: its own part, and the shared one if there is one."""
        names = f"block{block.index}", SHARED
        return [self.parts[name] for name in names if name in self.parts]

    def _accumulate(self, block: Block, block_step: int) -> Tensor:
        """Backward of the mean loss over the block's next batch; the loss, detached."""
        config = self.config
        indices = batch_indices(
            len(self.data), config.batch_size, seed=config.seed, block=block.index, step=block_step
        )
        draw = Draw(stream_seed(config.seed, block.index), block_step)
        total = torch.zeros((), device=self.device)
        for piece in indices.chunk(config.accumulate):
            batch = self.data.batch(piece, self.device)
            if self.augment:
                batch = self.augment(batch, draw)
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast):
                loss = self.objective(self.models.of(block), block, batch, draw)
            loss = loss / config.accumulate
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
        weights = {name: p.detach() for name, p in self.models.named_parameters()}
        average = {name: tensor for part in parts for name, tensor in part.average.items()}
        optimizer = {k: v for part in parts for k, v in part.optimizer_tensors().items()}
        groups = {"model": weights, "ema": average, "optimizer": optimizer}
        return {group: tensors for group, tensors in groups.items() if tensors}

    def counters(self) -> dict[str, int | dict[str, int]]:
        """The counts of steps that a checkpoint must hold."""
        return {"step": self.step, "parts": {name: part.steps for name, part in self.parts.items()}}

    def restore(self, tensors: dict[str, dict[str, Tensor]], counters: dict) -> None:
        """Go on from what `tensors` and `counters` once gave, bit for bit."""
        load_weights(self.models, tensors["model"])
        for name, part in self.parts.items():
            steps = counters["parts"][name]
            part.restore(steps, tensors.get("ema", {}), tensors.get("optimizer", {}))
        self.step = counters["step"]


def _not_finite(loss: float, norm: float, block: Block, block_step: int) -> str:
    noise = block.trained_noise
    return (
        f"the loss must be finite, got loss {loss} and gradient norm {norm} in "
        f"block {block.index} at its step {block_step} with sigma in "
        f"[{noise.low:.6g}, {noise.high:.6g}]; nothing was updated"
    )


@torch.no_grad()
def load_weights(models: BlockModels, weights: dict[str, Tensor]) -> None:
    """Copy weights into models made with the same configuration.

    Names that `weights` lacks keep their values: a moving average has none of what is frozen.

    Raises:
        ValueError: a name is unknown or a shape differs.
    """
    parameters = dict(models.named_parameters())
    for name, tensor in weights.items():
        shape = tuple(parameters[name].shape) if name in parameters else "no such parameter"
        if shape != tuple(tensor.shape):
            raise ValueError(f"weight {name} must be {shape}, got {tuple(tensor.shape)}")
        parameters[name].copy_(tensor)
