"""What a step does to parameters: a rate, an optimizer after the backward or in it, an average.

After the backward, gradients may be added up over micro-batches, and their norm may be clipped
before any parameter moves. In it, each parameter is updated as soon as its gradient is whole, so a
block's gradients take the memory of one layer's; Lv et al. 2023 (arXiv:2306.09782) do so end to
end. Without clipping both give the same bits.

The host hears of a loss that is not finite when it has launched the next update already. Until it
says `go_on`, no update does anything, and the norm of each is NaN.

Parameters of 2 bytes are updated in float32, of which they hold the rounded values: an update is
often less than their last bit, and in float16 the square of a small gradient is 0.
"""

import math
from collections.abc import Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from dbkernels.training.trainer_config import Decay, TrainerConfig


def learning_rate(step: int, total: int, *, lr: float, warmup: int, decay: Decay) -> float:
    """The rate of one update.

    Args:
        step:    updates that the parameters have had; 0 for the first
        total:   updates that they will have had at the end
        lr:      the highest rate
        warmup:  updates over which the rate rises linearly
        decay:   constant, or cosine down to 0 at `total`
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if decay == "constant":
        return lr
    done = (step - warmup) / max(1, total - warmup)
    return lr * (1 + math.cos(math.pi * min(1.0, done))) / 2


def average_decay(step: int, decay: float) -> float:
    """Decay of an exponential moving average, lower while few steps have been taken.

    Args:
        step:   updates that the averaged parameters have had, of their own
        decay:  in the long run; below 1
    """
    return min(decay, (1 + step) / (10 + step))


class ParamGroup:
    """One block's own parameters, or those that all blocks share.

    The optimizer's state exists from the start, in tensors that are never replaced: what holds
    their storage may be moved, and a checkpoint always has all of it. Of a parameter that is
    narrower than float32 it holds the parameter in float32, too, and so is its average.

    Args:
        parameters:  by name; there may be none
        config:      decay of the weights in AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) and
                     of the moving average, in this group's own steps; with CUDA graphs the rate is
                     read on the device
        total:       updates that the parameters will have had at the end of the run
        device:      of the updates; None is where the parameters are
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: TrainerConfig,
        *,
        total: int,
        device: torch.device | None = None,
    ):
        self.parameters, self.total, self.ema, self.steps = parameters, total, config.ema, 0
        device = next(iter(parameters.values())).device if device is None else device
        # of the newest parameters in the average
        self._newest = torch.zeros((), dtype=torch.float32, device=device)
        self._updated = {p: _wide(p) for p in parameters.values()}
        self.optimizer = torch.optim.AdamW(
            # a group, which may be empty: then a block's steps move what blocks share alone
            [{"params": list(self._updated.values())}],
            weight_decay=config.weight_decay,
            capturable=config.cuda_graphs,
            fused=True,
        )
        # a number where it can be one: fake tensors know no optimizer whose rate is a tensor
        self._rate = (
            torch.zeros((), dtype=torch.float32, device=device) if config.cuda_graphs else None
        )
        for parameter, updated in self._updated.items():
            # what a fused AdamW makes in its first step
            self.optimizer.state[updated] = {
                "step": torch.zeros((), dtype=torch.float32, device=updated.device),
                "exp_avg": torch.zeros_like(updated.detach()),
                "exp_avg_sq": torch.zeros_like(updated.detach()),
            }
            if updated is not parameter:
                self.optimizer.state[updated]["wide"] = updated
        averaged = parameters.items() if self.ema else ()
        self.average = {name: self._updated[p].detach().clone() for name, p in averaged}

    def prepare(self, lr: float) -> None:
        """Set the learning rate of the next update, and how far the average will move."""
        # rounded in either case as a tensor rounds it: the bits are the same
        rate = float(np.float32(lr)) if self._rate is None else self._rate.fill_(lr)
        self.optimizer.param_groups[0]["lr"] = rate
        if self.ema:
            self._newest.fill_(1 - average_decay(self.steps, self.ema))

    def update(self, where: Tensor, only: nn.Parameter | None = None) -> None:
        """Step the optimizer on the parameters that have gradients, and free these.

        Args:
            where:  () bool, on the parameters' device; where it is False nothing is updated
            only:   the one parameter to look at; None looks at all
        """
        # what a gradient scaler says to a fused optimizer, which reads it on the device
        self.optimizer.found_inf = (~where).float()
        group = self.optimizer.param_groups[0]
        every = group["params"]
        moving = self.parameters.values() if only is None else [only]
        group["params"] = [self._updated[parameter] for parameter in moving]
        pairs = [(p, self._updated[p]) for p in moving if p.grad is not None]
        narrow = [(p, updated) for p, updated in pairs if updated is not p]
        try:
            for parameter, updated in narrow:
                # what someone else has written into the parameter since is what is updated
                same = parameter.detach() == updated.to(parameter.dtype)
                updated.copy_(torch.where(same, updated, parameter.detach()))
                updated.grad, parameter.grad = parameter.grad.float(), None
            self.optimizer.step()
            for parameter, updated in narrow:
                parameter.detach().copy_(updated)
            self.optimizer.zero_grad()
        finally:
            group["params"] = every

    def drop_gradients(self) -> None:
        """Free the gradients of a step that was cut short."""
        for parameter, updated in self._updated.items():
            parameter.grad = updated.grad = None

    def move_average(self, where: Tensor) -> None:
        """Move the average toward the updated parameters, where `where`, as for `update`."""
        if self.ema:
            newest = self._newest * where
            for name, average in self.average.items():
                average.lerp_(self._updated[self.parameters[name]].detach(), newest)

    def tensors(self) -> list[Tensor]:
        """All that a step on these parameters reads and writes, but for gradients."""
        return [
            *self.parameters.values(),
            *self.optimizer_tensors().values(),
            *self.average.values(),
        ]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state, each tensor under `<parameter>.<name of the state>`."""
        return {
            f"{name}.{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state[self._updated[parameter]].items()
        }

    def restore(
        self, steps: int, average: dict[str, Tensor], optimizer_tensors: dict[str, Tensor]
    ) -> None:
        """Take back what `steps`, `average` and `optimizer_tensors` once gave."""
        self.steps = steps
        for ours, saved in ((self.average, average), (self.optimizer_tensors(), optimizer_tensors)):
            for name, tensor in ours.items():
                tensor.copy_(saved[name])


def tensor_sizes(parameters: Iterable[nn.Parameter], ema: float) -> list[int]:
    """Bytes of each of a group's tensors, in no order, before there is the group."""
    step, found = torch.zeros((), dtype=torch.float32).nbytes, []
    for parameter in parameters:
        wide = parameter.numel() * _wide_dtype(parameter).itemsize
        copies = (3 if ema else 2) + (wide > parameter.nbytes)
        found += [step, parameter.nbytes, *[wide] * copies]
    return found


def _wide_dtype(parameter: Tensor) -> torch.dtype:
    """Of what is updated, and of its optimizer's state and average."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _wide(parameter: nn.Parameter) -> Tensor:
    """The parameter itself, or its values in float32 where it is narrower."""
    dtype = _wide_dtype(parameter)
    return parameter if parameter.dtype == dtype else parameter.detach().to(dtype)


class Updater:
    """Makes of a loss the updates of some groups. Nothing is read back from the device.

    It updates when all gradients are there; not at all where the loss or one is not finite.

    Args:
        clip:    largest norm of an update's gradient; 0 for no limit
        device:  of the parameters that are updated
    """

    def __init__(self, clip: float, device: torch.device | str):
        # loss and gradients of every update so far; written in place, where a graph finds it
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._clip = clip or torch.inf

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss, or a micro-batch's share of one, whose gradients add up."""
        loss.backward()

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """End an update, whose losses sum to `loss`; no gradient is left.

        Returns:
            The gradient's norm before it was clipped, (); NaN after an update that was not finite.
        """
        parameters = [p for group in groups for p in group.parameters.values()]
        norm = nn.utils.clip_grad_norm_(parameters, self._clip)
        norm = torch.where(self._finite, norm, torch.nan)
        self._finite.copy_(torch.isfinite(loss + norm))
        for group in groups:
            group.update(where=self._finite)
            group.move_average(where=self._finite)
        return norm

    def go_on(self) -> None:
        """Update again, after loss or gradients that were not finite."""
        self._finite.fill_(True)


class UpdaterInBackward(Updater):
    """Updates in the backward, by hooks; nothing from the first gradient on that is not finite.

    Where the loss is not finite nothing is updated at all. Whoever else differentiates something
    that these parameters are in finds their gradients as ever.

    Args:
        groups:  all that it will ever update
        device:  of their updates
    """

    def __init__(self, groups: Sequence[ParamGroup], device: torch.device | str):
        super().__init__(0.0, device)
        self._squares, self._updates = torch.zeros((), dtype=torch.float32), False
        for group in groups:
            for parameter in group.parameters.values():
                parameter.register_post_accumulate_grad_hook(partial(self._update, group))

    def backward(self, loss: Tensor) -> None:
        """As `Updater.backward`, once in an update."""
        # of what is not finite this is NaN, and so is the sum
        self._squares = torch.where(self._finite, loss.detach() * 0, torch.nan)
        self._updates = True
        try:
            loss.backward()
        finally:
            self._updates = False

    def _update(self, group: ParamGroup, parameter: Tensor) -> None:
        if not self._updates:
            return
        self._squares += torch.linalg.vector_norm(parameter.grad).float().square()
        group.update(where=torch.isfinite(self._squares), only=parameter)

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """As `Updater.finish`."""
        self._finite.copy_(torch.isfinite(self._squares))
        for group in groups:
            group.move_average(where=self._finite)
        return self._squares.sqrt()
