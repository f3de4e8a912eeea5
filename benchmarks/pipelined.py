"""A model, or one of its blocks, cut at layers into stages of a pipeline: torch's own, by 1F1B.

A stage of S has its layers, the first the stem too and the last the head. Of M microbatches stage s
has at most min(M, S - s) in flight. So its peak is

    parameters, optimizer and gradients of the stage
    + min(M, S - s) * (what one microbatch keeps of it)
    + M * (what is received of one microbatch: activations, and gradients)
    + what one microbatch needs for a moment

`predicted` follows a stage by itself in that order, on tensors that hold nothing.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from composition_ways import Composed
from show import Row
from torch import Tensor, nn
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from dbkernels.data.images import Batch
from dbkernels.data.made_up import MadeUpData
from dbkernels.memory.measure import predict, record
from dbkernels.models.layer import run_layers
from dbkernels.ops.add_noise import add_noise
from dbkernels.ops.backend.register import dry_run_on_gpu, scratch_bytes
from dbkernels.ops.philox import Draw
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.optimizers.registry import OPTIMIZERS
from dbkernels.training.param_group import ParamGroup, Updater
from dbkernels.training.partition import Block

Buffer = tuple[Tensor, ...]  # what one stage passes to the next of a microbatch
MICROBATCHES = 8
FIRST = {"dit": ("patch", "condition", "label_table"), "ar": ("clean_table", "clean_condition")}
LAST = {
    "dit": ("modulation", "head"),
    "ar": ("head", "target_table", "condition"),  # the last is not read without noise
}


def can_be(recipe: Composed) -> bool:
    """Whether there are stages of some layers each, of a model that can be cut so here."""
    cut = recipe.family == "dit" or recipe.num_blocks == 1
    return recipe.stages == 1 or (cut and recipe.model.depth // recipe.num_blocks >= recipe.stages)


# stages


class Stage(nn.Module):
    """Some layers of a block; with the first ones the stem, with the last ones the head.

    Args:
        recipe:  of the model
        blocks:  whole; they are of no use afterwards
        rank:    of the stage
        size:    number of stages
    """

    def __init__(self, recipe: Composed, blocks: DiffusionBlocks, rank: int, size: int):
        super().__init__()
        block = blocks[0]
        self.recipe, self.is_first, self.is_last = recipe, rank == 0, rank == size - 1
        self.model = blocks.of(block)
        at, more = divmod(len(block.layers), size)
        sizes = [at + (stage < more) for stage in range(size)]
        own = block.layers[sum(sizes[:rank]) : sum(sizes[: rank + 1])]
        self.model.layers = nn.ModuleList(self.model.layers[index] for index in own)
        for names, is_there in ((FIRST, self.is_first), (LAST, self.is_last)):
            for name in () if is_there else names[recipe.family]:
                setattr(self.model, name, None)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> tuple[Tensor, ...] | Tensor:
        """What the next stage reads of a microbatch, (x, c); of the last stage its loss, (1,).

        Args:
            args:    of the first stage what `inputs` says, of others what the one before returned
            kwargs:  of the last stage what `aims` says
        """
        with torch.autocast(args[0].device.type, torch.bfloat16, enabled=self.recipe.autocast):
            x, c = self._begin(*args) if self.is_first else args
            x = self._run(x, c)
            return self._loss(x, c, **kwargs)[None] if self.is_last else (x, c)

    def _begin(self, *args: Tensor) -> tuple[Tensor, Tensor]:
        if self.recipe.family == "dit":
            scaled, level, label = args
            return self.model.stem(scaled, level, self.model.label_table(label))
        (token,) = args
        x = self.model.tokens_before(token)
        return x, self.model.constant_condition(len(token)).to(x.dtype).contiguous()

    def _run(self, x: Tensor, c: Tensor) -> Tensor:
        layers = list(self.model.layers)
        if self.recipe.family == "dit":
            return run_layers(layers, x, c)
        return run_layers(layers, x, c, self.model.rotary(x), attention="causal")

    def _loss(self, x: Tensor, c: Tensor, *, aim: Tensor, weight: Tensor) -> Tensor:
        if self.recipe.family == "dit":
            error = (self.model.tail(x, c) - aim).float().square().flatten(1).mean(1)
            return (weight * error).sum()
        return self.model.cross_entropy(self.model.head.clean(x, c), aim, weight, "sum")


def inputs(
    recipe: Composed, blocks: DiffusionBlocks, block: Block, batch: Batch, draw: Draw
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """What the first stage reads of a batch, and what the last one does: `aim` and `weight`.

    The losses of the last stage then add up to that of the block, or of the network without noise.
    """
    if recipe.family == "ar":
        token = batch["token"]
        weight = torch.full(token.shape, 1 / token.numel(), dtype=torch.float32)
        return (token,), {"aim": token, "weight": weight.to(token.device)}
    model, image = blocks.of(block), batch["image"]
    level, scale = blocks._levels(block, batch, draw)
    exact, prediction = level.double(), model.prediction
    p, q, alpha, beta = (
        each.float() for each in (*prediction.input(exact), *prediction.target(exact))
    )
    weight = (scale * prediction.estimate(exact)[1].square()).float()
    aim = add_noise(image, alpha, beta, draw)
    return (add_noise(image, p, q, draw), level, batch["label"]), {"aim": aim, "weight": weight}


@dataclass
class Piece:
    """A stage, what updates it, and its share of a batch."""

    stage: Stage
    group: ParamGroup
    updater: Updater
    reads: tuple[Tensor, ...]
    aims: dict[str, Tensor]

    def update(self, loss: Tensor) -> None:
        """End a step, whose gradients are there."""
        self.updater.finish(loss, [self.group])

    @property
    def inputs(self) -> list[Tensor]:
        """What it reads of the batch."""
        first, last = self.stage.is_first, self.stage.is_last
        return [*(self.reads if first else ()), *(self.aims.values() if last else ())]


def made_up_batch(recipe: Composed) -> Batch:
    """That of a step, whose noise is another."""
    data = MadeUpData(recipe.model.fields(), recipe.batch_size)
    return data.batch(torch.arange(recipe.batch_size))


def piece_of(recipe: Composed, rank: int, size: int) -> Piece:
    """One stage of so many, at its first step, on made-up data."""
    config = recipe.config()
    blocks = config.build("cpu")
    reads, aims = inputs(recipe, blocks, blocks[0], made_up_batch(recipe), Draw(0, 0))
    stage = Stage(recipe, blocks, rank, size)
    kind = OPTIMIZERS[config.trainer.optimizer]
    group = ParamGroup(dict(stage.named_parameters()), config.trainer, total=1, kind=kind)
    group.prepare(config.trainer.lr)
    return Piece(stage, group, Updater(config.trainer.clip, "cpu"), reads, aims)


# run by torch


def step_of(piece: Piece, rank: int, size: int) -> Callable[[], Tensor]:
    """A step of a stage, as the process of its rank calls it; gives the batch's loss, ().

    On all stages but the last the loss is 0.
    """
    device = piece.reads[0].device
    stage = PipelineStage(piece.stage, rank, size, device)
    schedule = Schedule1F1B(
        stage, MICROBATCHES, loss_fn=lambda loss, _: loss.sum(), scale_grads=False
    )

    def step() -> Tensor:
        losses: list[Tensor] = []
        if piece.stage.is_first:
            schedule.step(*piece.reads)
        elif piece.stage.is_last:
            told = {"target": piece.aims["aim"], "losses": losses, "return_outputs": False}
            schedule.step(**piece.aims, **told)
        else:
            schedule.step()
        loss = torch.stack(losses).sum() if losses else torch.zeros((), dtype=torch.float32)
        return loss.detach()

    return step


# predicted


def predicted(recipe: Composed, stages: int) -> Row:
    """Figures of the stage that needs the most; as many operations as any stage has."""
    with FakeTensorMode(), dry_run_on_gpu(recipe.device.processors):
        found = every_stage(recipe, stages)
    row = max(found, key=lambda each: each["peak_allocated_bytes"])
    return row | {"flops": max(each["flops"] for each in found)}


def every_stage(recipe: Composed, stages: int) -> list[Row]:
    """Figures of each stage, which is followed by itself."""
    piece, found = piece_of(recipe, 0, stages), []
    with torch.no_grad():
        passed = piece.stage(*(t[: len(t) // MICROBATCHES] for t in piece.reads))
    for rank in range(stages):
        piece = piece_of(recipe, rank, stages)
        found.append(_followed(piece, rank, stages, passed))
    return found


def _followed(piece: Piece, rank: int, stages: int, passed: Buffer) -> Row:
    target = piece.stage.recipe.device

    def workspace(func: OpOverload, args: tuple, kwargs: dict) -> int:
        own = scratch_bytes(func, args) if target.is_gpu else 0
        return own or target.workspace(func, args, kwargs)

    def made(is_end: bool) -> list[Buffer]:
        each = range(0 if is_end else MICROBATCHES)
        return [tuple(map(torch.empty_like, passed)) for _ in each]

    received, grads = made(piece.stage.is_first), made(piece.stage.is_last)
    buffers = [t for each in (*received, *grads) for t in each]
    trace = record(
        lambda: _one_by_one(piece, received, grads, min(MICROBATCHES, stages - rank)),
        model=piece.stage,
        optimizers=piece.group.optimizers,
        inputs=[*piece.inputs, *buffers],
        workspace=workspace,
    )
    found = predict(trace, target)
    # as much is sent as is received, in the other direction
    sent = sum(t.nbytes for t in buffers)
    return {
        "peak_allocated_bytes": found.peak_allocated_bytes,
        "by_category": found.by_category,
        "flops": found.flops,
        "sent_bytes": sent,
        "sent": {"send": sent},
        "copied_bytes": 0,
    }


def _one_by_one(piece: Piece, received: list[Buffer], grads: list[Buffer], most: int) -> None:
    """A step of a stage by itself, of whose microbatches at most so many are in flight."""
    waiting: deque[tuple[int, Buffer]] = deque()
    size = len(piece.reads[0]) // MICROBATCHES
    for each in range(MICROBATCHES + most):
        if each >= most:
            done, out = waiting.popleft()
            torch.autograd.backward(out, grads[done] if grads else None)
            # what was sent of the microbatch before is free when the next one is sent
            for t in received[done - 1] if received and done else ():
                t.grad = None
        if each < MICROBATCHES:
            part = slice(each * size, (each + 1) * size)
            aims = {name: t[part] for name, t in piece.aims.items()}
            if piece.stage.is_first:
                args = tuple(t[part] for t in piece.reads)
            else:
                args = tuple(t.requires_grad_() for t in received[each])
            out = piece.stage(*args, **(aims if piece.stage.is_last else {}))
            waiting.append((each, out if isinstance(out, tuple) else (out,)))
    piece.update(torch.zeros((), dtype=torch.float32))
