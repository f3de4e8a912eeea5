"""The loop: draw a block, step it.

No gradient crosses blocks, and everything random in a step is a function of (seed, block, the
block's own step): where blocks share no parameter, training them in any order or interleaving
gives the same bits.

A step is launched, and its row is read when the next one was launched: the device waits for no one.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import fields, replace
from functools import partial
from time import perf_counter

import torch
from torch import Tensor
from torch.utils.data import Dataset

from dbkernels.data.dataset import Keys
from dbkernels.data.images import Batch, Data
from dbkernels.data.stream import Place
from dbkernels.models import stem_and_head
from dbkernels.ops.philox import Draw, stream_seed
from dbkernels.training import pending
from dbkernels.training.block_order import BlockOrder
from dbkernels.training.checkpoint.shard import Parts, Tensors
from dbkernels.training.contents import contents, require_contents, take_back
from dbkernels.training.cuda_graphs import CudaGraphs, CudaRecorder
from dbkernels.training.diffusion_blocks import SHARED, DiffusionBlocks, own_group
from dbkernels.training.offload.activations import ActivationOffload
from dbkernels.training.offload.offloader import device_of, open_offloader
from dbkernels.training.one_thread import OneThread
from dbkernels.training.optimizers.decay import DecayOn, DecayRule, rule_of
from dbkernels.training.optimizers.kind import OptimizerFactory
from dbkernels.training.optimizers.registry import OPTIMIZERS, OptimizerName
from dbkernels.training.optimizers.schedule import Rates, Schedule
from dbkernels.training.optimizers.trial import tried
from dbkernels.training.parallel.job import ALONE, Job
from dbkernels.training.parallel.place import place
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.param_groups import make_groups, make_updater
from dbkernels.training.partition import Block
from dbkernels.training.samples import open_samples
from dbkernels.training.saved import require_counters
from dbkernels.training.tensor_file import Pieces
from dbkernels.training.trainer_config import Decay, Offload, Order, TrainerConfig

Objective = Callable[[DiffusionBlocks, Block, Batch, Draw], Tensor]
Augment = Callable[[Batch, Draw], Batch]
Counters = dict[str, int | dict[str, int] | dict[str, float] | Place]


class Trainer:
    """Trains the blocks of a model.

    Args:
        blocks:     on the device; on the host where they are offloaded, or may be shared out
        data:       gives batches by sample index, as `ImageData.batch` does; or a Dataset, as
                    `DatasetBatches` takes it; or an iterable of batches, as `Stream` takes it
        steps:      updates of every block
        keys:       names of the parts of each sample, where a Dataset or a stream gives tuples
        workers:    processes that read the samples of coming steps; 0 has each step read its own.
                    It changes no number of a run
        objective:  (blocks, block, batch, draw) -> scalar loss, a mean over the batch; None is
                    `DiffusionBlocks.loss`
        make_optimizer:  (parameter groups of torch) -> an optimizer, in place of a named one; the
                    trainer sets the rates of all its groups
        schedule:   (optimizer, updates) -> one of torch's schedulers, whose rates are in place of
                    those of warmup and decay
        decays:     (name, parameter) -> bool, whether weight decay is on a parameter, in place of
                    decay_on
        augment:    (batch, draw) -> batch, applied to every batch that is drawn; with graphs, all
                    in which one step differs from the next reaches it and the objective in tensors
        device:     to train on; None is where the blocks are
        job:        this process among those that train the same blocks, which share each batch and
                    perhaps each layer
    The other arguments are the fields of `TrainerConfig`, which says what they mean.

    A trainer is for one thread at a time: another that comes to it meanwhile is refused.

    Raises:
        ValueError: a setting has a value that it cannot have, or contradicts another; the blocks
                    are on another device and offload is none, or offload_dir has no room for them;
                    or nothing that a block's steps would update is trainable.
    """

    def __init__(
        self,
        blocks: DiffusionBlocks,
        data: Data | Dataset | Iterable[object],
        *,
        steps: int,
        keys: Keys | None = None,
        workers: int = 0,
        batch_size: int = TrainerConfig.batch_size,
        optimizer: OptimizerName = TrainerConfig.optimizer,
        lr: float = TrainerConfig.lr,
        warmup: int = TrainerConfig.warmup,
        decay: Decay = TrainerConfig.decay,
        weight_decay: float = TrainerConfig.weight_decay,
        decay_on: DecayOn = TrainerConfig.decay_on,
        clip: float = TrainerConfig.clip,
        ema: float = TrainerConfig.ema,
        accumulate: int = TrainerConfig.accumulate,
        optimizer_in_backward: bool = TrainerConfig.optimizer_in_backward,
        cuda_graphs: bool = TrainerConfig.cuda_graphs,
        compile_stem_and_head: bool = TrainerConfig.compile_stem_and_head,
        autocast: bool = TrainerConfig.autocast,
        order: Order = TrainerConfig.order,
        steps_per_swap: int = TrainerConfig.steps_per_swap,
        offload: Offload = TrainerConfig.offload,
        offload_dir: str = TrainerConfig.offload_dir,
        prefetch: bool = TrainerConfig.prefetch,
        shard: bool = TrainerConfig.shard,
        offload_activations: bool = TrainerConfig.offload_activations,
        seed: int = TrainerConfig.seed,
        make_optimizer: OptimizerFactory | None = None,
        schedule: Schedule | None = None,
        decays: DecayRule | None = None,
        objective: Objective | None = None,
        augment: Augment | None = None,
        device: torch.device | str | None = None,
        job: Job = ALONE,
    ):
        # each of its fields is an argument, with its default
        settings = locals()
        config = TrainerConfig(**{each.name: settings[each.name] for each in fields(TrainerConfig)})
        self.config = config
        self.blocks = blocks.train()
        self.objective, self.augment = objective or DiffusionBlocks.loss, augment
        self.device = device_of(blocks, config, device, shared_out=job.shares_out(shard))
        named = OPTIMIZERS[config.optimizer]
        kind = tried(make_optimizer, self.device) if make_optimizer else named
        self.placements = place(blocks, config, job, kind)
        self._share = self.placements.job.share(config.batch_size, config.accumulate)
        told = {"device": self.device, "share": self._share}
        self.samples = open_samples(data, keys, workers, config, **told)
        self.data = self.samples.data
        if compile_stem_and_head:
            for model in (blocks.model, *blocks.copies):
                stem_and_head.compile_stem_and_head(model, self.device)
        self.step = 0
        self.block_order = BlockOrder(blocks.in_running_order, config)
        self.samples.expect(lambda: self.block_order.coming(self.step, self._own_steps()))
        self._size = self._share.stop - self._share.start
        size = self._size // config.accumulate
        # an optimizer in the backward cannot wait for gradients to add up, and other processes wait
        # for gradients of as many parts as they have
        least = size if config.optimizer_in_backward or self.placements.job.group else 1
        self.micro_batch = pending.MicroBatch(size, self._size, least=least)
        self._rates = Rates(config, schedule)
        decays = decays or rule_of(config.decay_on, blocks)
        self.offloader = open_offloader(blocks, self.device, config, kind)
        self.activations = ActivationOffload(blocks, self.device, enabled=offload_activations)
        self._alone = OneThread()
        self._untrained = [each for each in blocks.named_parameters() if not each[1].requires_grad]
        told = {"kind": kind, "decays": decays, "offloader": self.offloader}
        self.groups = make_groups(blocks, config, device=self.device, **told)
        self.updater = make_updater(self.groups, config, self.placements, device=self.device)
        self.staging = pending.Staging(self.device)
        self.cuda_graphs = CudaGraphs(CudaRecorder(self.device)) if config.cuda_graphs else None
        # what a graph reads of a step
        self._held = pending.HeldSamples()
        self._block_step = torch.zeros((), dtype=torch.int64, device=self.device)

    @property
    def total_steps(self) -> int:
        """Steps of the run: those of every block."""
        return self.config.steps * len(self.blocks.trained)

    def next_block(self) -> Block:
        """The block that the run's next step trains."""
        return self.blocks[self.block_order.block(self.step)]

    def run(self, on_row: Callable[[pending.Row], object] = lambda row: None) -> None:
        """Train to the end, without a log or a checkpoint.

        Args:
            on_row:  called with the row of each step, as `launch` has it, when the next step was
                     launched
        """
        with closing(self.samples), pending.Rows(on_row) as rows:
            while self.step < self.total_steps:
                rows.add(self.launch(self.next_block()))
        self.close()

    def close(self) -> None:
        """Free the device of what was brought there from the host, and end the workers; a step
        brings it back."""
        with self._alone:
            self.samples.close()
            self.offloader.close()
            if self.cuda_graphs is not None:
                self.cuda_graphs.drop()

    def step_block(self, block: Block) -> pending.Row:
        """One update of one block and of what it shares, waited for: `launch`, and its row."""
        return self.launch(block).row()

    def launch(self, block: Block) -> pending.Pending:
        """Launch one update of one block and of what it shares, and wait for nothing.

        Its row has the step of the run, block, the block's own step, loss, norm of the gradient,
        and rate; also steps_per_swap or the size of a micro-batch where this step has set it.
        It raises FloatingPointError where loss or gradient is not finite. Then neither this step
        nor one that was launched after it has updated anything, and none of them is counted; with
        an optimizer in the backward, parameters that had their gradients by then were updated.

        Raises:
            torch.OutOfMemoryError: half the micro-batch is too much too; nothing was updated, but
                for parameters that an optimizer in the backward had reached.
            ValueError: another thread uses the trainer, or a parameter was thawed meanwhile.
        """
        with self._alone:
            self._require_frozen()
            return self._launch(block)

    def _require_frozen(self) -> None:
        for name, parameter in self._untrained:
            if parameter.requires_grad:
                raise ValueError(
                    f"{name} must stay frozen, as it was when the trainer was made, got one that "
                    "requires a gradient: make another trainer"
                )

    def _launch(self, block: Block) -> pending.Pending:
        begin, micro_batch, before = perf_counter(), self.micro_batch.size, self._counted()
        own, *_ = moved = self.moved(block)
        row: pending.Row = {"step": self.step, "block": block.index, "block_step": own.steps}
        row |= {"loss": math.nan, "grad_norm": math.nan, "lr": self._rates.of(own.steps, own.total)}
        launched = pending.Pending(row, self.advance(block), partial(self._refused, block, before))
        if (following := self.block_order.next_block(self.step)) is not None:
            self.offloader.prefetch(own_group(self.blocks[following]))
        for group in moved:
            group.steps += 1
        self.step += 1
        if self.micro_batch.size != micro_batch:
            row["micro_batch"] = self.micro_batch.size
        if not self.block_order.steps_per_swap:
            # the few steps that are timed are waited for
            launched.wait()
            if self.block_order.timed(
                self.step, perf_counter() - begin, self.offloader.swap_seconds
            ):
                row["steps_per_swap"] = self.block_order.steps_per_swap
        return launched

    def _refused(
        self, block: Block, before: Counters, loss: float, norm: float
    ) -> FloatingPointError:
        """Count a step that was not finite, and those after it, as if they had not been."""
        self.step = before["step"]
        for name, group in self.groups.items():
            group.steps = before["groups"][name]
        self.updater.go_on()
        # where the loss is finite, a gradient is not, and those before it have been used
        some = self.config.optimizer_in_backward and math.isfinite(loss)
        updated = "parameters with earlier gradients were" if some else "nothing was"
        noise, (own, *_) = block.trained_noise, self.moved(block)
        return FloatingPointError(
            f"the loss must be finite, got loss {loss} and gradient norm {norm} in block "
            f"{block.index} at its step {own.steps} with sigma in [{noise.low:.6g}, "
            f"{noise.high:.6g}]; {updated} updated"
        )

    def advance(self, block: Block) -> tuple[Tensor, ...]:
        """The device's share of a step, read back only as `ParamGroup.update` says; no count moves.

        Returns:
            Loss and norm of the gradient, (), and where several processes train how many of them
            were asked to end. Where one is not finite, nothing was updated, but for what an
            optimizer in the backward had moved by then; nor is anything updated from there on,
            until the step's `Pending.row` has raised.
        """
        self.offloader.enter(own_group(block))
        moved = self.moved(block)
        # a step that something else cut short, such as a broken image, has left its own
        _drop_gradients(moved)
        for group in moved:
            group.prepare(self._rates.of(group.steps, group.total))
        config, block_step = self.config, moved[0].steps
        pieces = self.samples.of_step(block.index, block_step, self.staging.put)
        draw = Draw(stream_seed(config.seed, block.index), block_step, sample=self._share.start)
        if self.cuda_graphs is None:
            return self._update(block, draw, pieces)
        self._held.fill(next(pieces(self._size)))
        self._block_step.fill_(block_step)
        draw = replace(draw, step=self._block_step)
        update = partial(self._update, block, draw, self._held.pieces)
        # steps that one graph serves have the same tensors at the same addresses
        return self.cuda_graphs.run(
            lambda: (block.index, self.offloader.slot, self.micro_batch.size), update
        )

    def moved(self, block: Block) -> list[ParamGroup]:
        """What a step on a block updates: its own group, and the shared one if there is one."""
        return [self.groups[name] for name in (own_group(block), SHARED) if name in self.groups]

    def _update(self, block: Block, draw: Draw, pieces: pending.Pieces) -> tuple[Tensor, ...]:
        """What a step runs on the device, once its inputs are there; what `advance` returns."""
        moved = self.moved(block)
        loss = self.micro_batch.attempt(
            partial(self._accumulate, block, draw, pieces),
            partial(_drop_gradients, moved),
            f"block {block.index} at its step {moved[0].steps}",
        )
        if self.placements.job.group is None:
            return loss, self.updater.finish(loss, moved)
        # all judge the same number, and so end or go on together
        loss, asked = self.placements.job.mean(loss)
        return loss, self.updater.finish(loss, moved), asked

    def _accumulate(self, block: Block, draw: Draw, pieces: pending.Pieces, size: int) -> Tensor:
        """Backward of the mean loss over the block's next batch; the loss, detached."""
        config, left = self.config, self._size
        total = torch.zeros((), dtype=torch.float32, device=self.device)
        for batch in pieces(size):
            count = len(next(iter(batch.values())))
            batch = self.augment(batch, draw) if self.augment else batch
            cast = torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast)
            with cast, self.activations.around(batch.values()):
                loss = self.objective(self.blocks, block, batch, draw)
            loss, left = loss / (self._size / count), left - count
            self.updater.backward(loss, is_last=not left)
            total += loss.detach()
            draw = replace(draw, sample=draw.sample + count)
        return total

    def tensors(self) -> Parts:
        """Everything that a checkpoint must hold: weights, their average, optimizer state.

        Raises:
            ValueError: a weight has fewer bits than its dtype says, which no checkpoint holds.
        """
        with self._alone:
            self.offloader.wait()
        return contents(self.blocks, self.groups, self.placements)

    def read(self, tensor: Tensor) -> Pieces:
        """The bytes of one of `tensors`, of which no copy is made but of a piece.

        Raises:
            ValueError: the file that its block rests in was cut short or has other bytes.
        """
        return self.offloader.read(tensor)

    def counters(self) -> Counters:
        """The counts of steps, and what was found out on the way, that a checkpoint must hold.

        The row of every step that was launched must have been read: one that was not finite counts
        until then.
        """
        return {**self._counted(), **self.samples.place()}

    def _own_steps(self) -> dict[int, int]:
        return {block.index: self.groups[own_group(block)].steps for block in self.blocks.trained}

    def _counted(self) -> Counters:
        counters: Counters = {
            "step": self.step,
            "groups": {name: group.steps for name, group in self.groups.items()},
            "steps_per_swap": self.block_order.steps_per_swap,
            "micro_batch": self.micro_batch.size,
        }
        counts = {k: v for group in self.groups.values() for k, v in group.counts().items()}
        return counters | ({"optimizer": counts} if counts else {})

    def restore(self, tensors: Tensors, counters: Counters) -> None:
        """Go on from what `tensors` and `counters` once gave, bit for bit.

        Raises:
            ValueError: they are not what they gave, the optimizer is in the backward, and gradients
                have to be added up; or another thread uses the trainer.
        """
        with self._alone:
            self._restore(tensors, counters)

    def _restore(self, tensors: Tensors, counters: Counters) -> None:
        require_counters(self.samples.check(counters), self._counted())
        require_contents(tensors, self.tensors())
        size = counters["micro_batch"]
        if self.config.optimizer_in_backward and size < self.config.batch_size:
            raise ValueError(
                "optimizer_in_backward must be False to go on from a checkpoint whose batches of "
                f"{self.config.batch_size} are cut into micro-batches of {size}, got True"
            )
        self.samples.go_on(counters)
        self.offloader.settle()
        take_back(self.blocks, self.groups, self.placements, tensors, counters)
        self.step, self.block_order.steps_per_swap = counters["step"], counters["steps_per_swap"]
        # processes may be more by now, and then have fewer samples each
        self.micro_batch.size = min(size, self._size)
        self.updater.go_on()


def _drop_gradients(groups: list[ParamGroup]) -> None:
    for group in groups:
        group.drop_gradients()
