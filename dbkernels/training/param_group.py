"""Parameters that are updated together: their optimizer, their average, their count of steps."""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from dbkernels.training.schedule import average_decay


class ParamGroup:
    """One block's own parameters, or those that all blocks share.

    The optimizer's state exists from the start, in tensors that are never replaced: what holds
    their storage may be moved, and a checkpoint always has all of it.

    Args:
        parameters:    by name
        total:         updates that they will have had at the end of the run
        weight_decay:  of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)
        ema:           decay of the moving average, counted in this group's own steps; 0 for none
        device:        of the updates; None is where the parameters are
        captured:      whether updates are recorded in a graph, which reads the rate on the device
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        *,
        total: int,
        weight_decay: float,
        ema: float,
        device: torch.device | None = None,
        captured: bool = False,
    ):
        self.parameters, self.total, self.ema, self.steps = parameters, total, ema, 0
        device = next(iter(parameters.values())).device if device is None else device
        # of the newest parameters in the average
        self._newest = torch.zeros((), device=device)
        self.optimizer = torch.optim.AdamW(
            parameters.values(), weight_decay=weight_decay, fused=True
        )
        # a number where it can be one: fake tensors know no optimizer whose rate is a tensor
        self._rate = torch.zeros((), device=device) if captured else None
        for parameter in parameters.values():
            self.optimizer.state[parameter] = _fresh_state(parameter)
        self.average = {n: p.detach().clone() for n, p in parameters.items()} if ema else {}

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
        group["params"] = every if only is None else [only]
        try:
            self.optimizer.step()
            self.optimizer.zero_grad()
        finally:
            group["params"] = every

    def move_average(self, where: Tensor) -> None:
        """Move the average toward the updated parameters, where `where`, as for `update`."""
        if self.ema:
            newest = self._newest * where
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), newest)

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
            for key, value in self.optimizer.state[parameter].items()
        }

    def restore(
        self, steps: int, average: dict[str, Tensor], optimizer_tensors: dict[str, Tensor]
    ) -> None:
        """Take back what `steps`, `average` and `optimizer_tensors` once gave."""
        self.steps = steps
        for name, tensor in self.average.items():
            tensor.copy_(average[name])
        for name, tensor in self.optimizer_tensors().items():
            tensor.copy_(optimizer_tensors[name])


def _fresh_state(parameter: nn.Parameter) -> dict[str, Tensor]:
    """What a fused AdamW makes in its first step."""
    return {
        "step": torch.zeros((), device=parameter.device),
        "exp_avg": torch.zeros_like(parameter.detach()),
        "exp_avg_sq": torch.zeros_like(parameter.detach()),
    }


def tensor_sizes(parameters: Iterable[nn.Parameter], ema: float) -> list[int]:
    """Bytes of each of a group's tensors, in no order, before there is the group."""
    step = torch.zeros(()).nbytes
    moments_and_average = 3 if ema else 2
    return [
        size
        for parameter in parameters
        for size in (step, *[parameter.nbytes] * (1 + moments_and_average))
    ]
