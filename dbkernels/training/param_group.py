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

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from dbkernels.memory.plain import is_wrapper, plain_tensors, where_it_lies
from dbkernels.training.optimizers.adamw import FusedAdamW
from dbkernels.training.optimizers.decay import DecayRule, on_all
from dbkernels.training.optimizers.kind import Kind, Trained, set_rate, skips
from dbkernels.training.parallel.gradients import SharedGradients
from dbkernels.training.parallel.placement import here
from dbkernels.training.trainer_config import TrainerConfig

ADAMW = FusedAdamW()


def average_decay(step: int, decay: float) -> float:
    """Decay of an exponential moving average, lower while few steps have been taken.

    Args:
        step:   updates that the averaged parameters have had, of their own
        decay:  in the long run; below 1
    """
    return min(decay, (1 + step) / (10 + step))


class ParamGroup:
    """One block's own parameters, or those that all blocks share.

    The optimizers' state exists from the start, in tensors that are never replaced: what holds
    their storage may be moved, and a checkpoint always has all of it. Of a parameter that is
    narrower than float32 it holds the parameter in float32, too, and so is its average.

    Args:
        parameters:  by name; there may be none
        config:      how far weights decay, and the decay of the moving average, in this group's own
                     steps; with CUDA graphs the rate is read on the device
        total:       updates that the parameters will have had at the end of the run
        device:      of the updates; None is where the parameters are
        kind:        of the optimizers
        decays:      which parameters weight decay is on
    Raises:
        ValueError: the kind cannot do what the configuration asks for.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        config: TrainerConfig,
        *,
        total: int,
        device: torch.device | None = None,
        kind: Kind = ADAMW,
        decays: DecayRule = on_all,
    ):
        self.parameters, self.total, self.ema, self.steps = parameters, total, config.ema, 0
        device = next(iter(parameters.values())).device if device is None else device
        # of a parameter that is shared out, this process's share
        self._here = {p: here(p) for p in parameters.values()}
        # of the newest parameters in the average
        self._newest = torch.zeros((), dtype=torch.float32, device=device)
        self._updated = {p: _wide(own) for p, own in self._here.items()}
        self._trained = [
            Trained(name, self._updated[p], config.weight_decay if decays(name, p) else 0.0)
            for name, p in parameters.items()
        ]
        if config.cuda_graphs and not kind.capturable:
            raise ValueError(f"cuda_graphs must be off for {kind.name}, got on")
        self._kind = kind
        self.optimizers = kind.make(self._trained, captured=config.cuda_graphs)
        self._waits = not all(map(skips, self.optimizers))
        if config.optimizer_in_backward and self._waits:
            raise ValueError(
                f"optimizer_in_backward must be False for {kind.name}, which cannot be told on the "
                "device to leave out a step, got True"
            )
        # a number where it can be one: fake tensors know no optimizer whose rate is a tensor
        self._rate = (
            torch.zeros((), dtype=torch.float32, device=device) if config.cuda_graphs else None
        )
        self._optimizer_of = {
            tensor: optimizer
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for tensor in group["params"]
        }
        for parameter, updated in self._updated.items():
            optimizer = self._optimizer_of[updated]
            state = kind.state(optimizer, updated)
            optimizer.state[updated] = state
            if updated is not self._here[parameter]:
                state["wide"] = updated
        states = [o.state[updated] for updated, o in self._optimizer_of.items()]
        self._wrappers = [(s, key) for s in states for key, t in s.items() if is_wrapper(t)]
        averaged = parameters.items() if self.ema else ()
        self.average = {name: self._updated[p].detach().clone() for name, p in averaged}

    def prepare(self, lr: float) -> None:
        """Set the learning rate of the next update, and how far the average will move."""
        # rounded in either case as a tensor rounds it: the bits are the same
        rate = float(np.float32(lr)) if self._rate is None else self._rate.fill_(lr)
        for optimizer in self.optimizers:
            set_rate(optimizer, rate)
        for state, key in self._wrappers:
            # what it wraps may have moved with its block
            state[key] = where_it_lies(state[key])
        if self.ema:
            self._newest.fill_(1 - average_decay(self.steps, self.ema))

    def update(self, where: Tensor, only: nn.Parameter | None = None) -> None:
        """Step the optimizers on the parameters that have gradients, and free these.

        Nothing is read back from the device, but for `where` with an optimizer that cannot leave
        out a step there, as `skips` says.

        Args:
            where:  () bool, on the parameters' device; where it is False nothing is updated
            only:   the one parameter to look at; None looks at all
        """
        moving = self.parameters.values() if only is None else [only]
        # fake tensors have no numbers, and their steps are all taken
        if self._waits and not isinstance(where, FakeTensor) and not where:
            self.drop_gradients()
            return
        narrow = []
        for parameter in moving:
            own, updated, grad = self._here[parameter], self._updated[parameter], parameter.grad
            if grad is None or updated is parameter:
                continue
            if updated is not own:
                narrow.append((own, updated))
                # what someone else has written into the parameter since is what is updated
                same = own.detach() == updated.to(own.dtype)
                updated.copy_(torch.where(same, updated, own.detach()))
            updated.grad, parameter.grad = here(grad).to(updated.dtype), None
        tensors = None if only is None else {self._updated[only]}
        for optimizer in self.optimizers:
            if skips(optimizer):
                # what a gradient scaler says to it, and it reads on the device
                vars(optimizer)["found_inf"] = (~where).float()
            _step(optimizer, tensors)
        for own, updated in narrow:
            own.detach().copy_(updated)

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
            *self._here.values(),
            *self.optimizer_tensors().values(),
            *self.average.values(),
        ]

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizers' state, each tensor under `<parameter>.<name of the state>`.

        A state that wraps several tensors has them under `<parameter>.<name>.<name inside>`.
        """
        return {
            name: tensor
            for each, state in self._states()
            for key, value in state.items()
            if isinstance(value, Tensor)
            for name, tensor in plain_tensors(f"{each.name}.{key}", value)
        }

    def counts(self) -> dict[str, float]:
        """Numbers that the optimizers' own steps change and that no tensor holds."""
        return {name: float(owner[key]) for name, owner, key in self._counted()}

    def _states(self) -> Iterator[tuple[Trained, dict]]:
        for each in self._trained:
            yield each, self._optimizer_of[each.tensor].state[each.tensor]

    def _counted(self) -> Iterator[tuple[str, dict, str]]:
        """Name of each number, the dictionary that has it, and its key there."""
        groups = (group for each in self.optimizers for group in each.param_groups)
        for place, group in enumerate(groups):
            for key in self._kind.counts:
                yield f"{self._trained[0].name}.{place}.{key}", group, key
        for each, state in self._states():
            for key, value in state.items():
                if isinstance(value, int | float):
                    yield f"{each.name}.{key}", state, key

    def restore(
        self,
        steps: int,
        average: dict[str, Tensor],
        optimizer_tensors: dict[str, Tensor],
        counts: Mapping[str, float],
    ) -> None:
        """Take back what `steps`, `average`, `optimizer_tensors` and `counts` once gave."""
        self.steps = steps
        for name, owner, key in [*self._counted()]:
            owner[key] = type(owner[key])(counts[name])
        for ours, saved in ((self.average, average), (self.optimizer_tensors(), optimizer_tensors)):
            for name, tensor in ours.items():
                tensor.copy_(saved[name])


def tensor_sizes(
    parameters: Mapping[str, nn.Parameter], config: TrainerConfig, kind: Kind
) -> list[int]:
    """Bytes of each of a group's tensors, in no order, before there is the group."""
    found = []
    for name, parameter in parameters.items():
        # the state of one parameter at a time
        alone = ParamGroup({name: parameter}, config, total=1, kind=kind)
        found += [tensor.nbytes for tensor in alone.tensors()]
    return found


def _wide_dtype(parameter: Tensor) -> torch.dtype:
    """Of what is updated, and of its optimizer's state and average."""
    return torch.promote_types(parameter.dtype, torch.float32)


def _step(optimizer: Optimizer, only: set[Tensor] | None) -> None:
    """A step on all tensors that have gradients, or on some of them; the gradients are freed."""
    groups = optimizer.param_groups
    every = [group["params"] for group in groups]
    try:
        if only is not None:
            for group in groups:
                group["params"] = [tensor for tensor in group["params"] if tensor in only]
        optimizer.step()
        optimizer.zero_grad()
    finally:
        for group, tensors in zip(groups, every, strict=True):
            group["params"] = tensors


def _wide(parameter: Tensor) -> Tensor:
    """The parameter itself, or its values in float32 where it is narrower."""
    dtype = _wide_dtype(parameter)
    return parameter if parameter.dtype == dtype else parameter.detach().to(dtype)


class Updater:
    """Makes of a loss the updates of some groups; read back as `ParamGroup.update` says.

    It updates when all gradients are there; not at all where the loss or one is not finite.

    Args:
        clip:    largest norm of an update's gradient; 0 for no limit
        device:  of the parameters that are updated
        shared:  makes the gradients of several processes one; None is for a process alone
    """

    def __init__(
        self,
        clip: float,
        device: torch.device | str,
        shared: SharedGradients | None = None,
    ):
        self._shared = shared or SharedGradients()
        # loss and gradients of every update so far; written in place, where a graph finds it
        self._finite = torch.ones((), dtype=torch.bool, device=device)
        self._clip = clip or torch.inf

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """Differentiate a loss, or a micro-batch's share of one, whose gradients add up."""
        self._shared.backward(loss, is_last=is_last)

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """End an update, whose losses sum to `loss`; no gradient is left.

        Returns:
            The gradient's norm before it was clipped, (); NaN after an update that was not finite.
        """
        parameters = [p for group in groups for p in group.parameters.values()]
        norm = self._shared.clip(parameters, self._clip)
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

    def backward(self, loss: Tensor, *, is_last: bool = True) -> None:
        """As `Updater.backward`, once in an update."""
        # of what is not finite this is NaN, and so is the sum
        self._squares = torch.where(self._finite, loss.detach() * 0, torch.nan)
        self._updates = True
        try:
            loss.backward()
        finally:
            self._updates = False

    def _update(self, group: ParamGroup, parameter: nn.Parameter) -> None:
        if not self._updates or parameter.grad is None:
            return
        self._squares += torch.linalg.vector_norm(parameter.grad).float().square()
        group.update(where=torch.isfinite(self._squares), only=parameter)

    def finish(self, loss: Tensor, groups: Sequence[ParamGroup]) -> Tensor:
        """As `Updater.finish`."""
        self._finite.copy_(torch.isfinite(self._squares))
        for group in groups:
            group.move_average(where=self._finite)
        return self._squares.sqrt()
