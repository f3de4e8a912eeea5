"""Parameters that are updated together: their optimizer, their average, their count of steps."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dbkernels.training.schedule import average_decay


class Part:
    """One block's own parameters, or those that all blocks share.

    The optimizer's state exists from the start, in tensors that are never replaced: what holds
    their storage may be moved, and a checkpoint always has all of it.

    Args:
        parameters:    by name
        total:         updates that they will have had at the end of the run
        weight_decay:  of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101)
        ema:           decay of the moving average, counted in this part's own steps; 0 for none
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, total: int, weight_decay: float, ema: float
    ):
        self.parameters, self.total, self.ema, self.steps = parameters, total, ema, 0
        self.optimizer = torch.optim.AdamW(
            parameters.values(), weight_decay=weight_decay, fused=True
        )
        for parameter in parameters.values():
            self.optimizer.state[parameter] = _fresh_state(parameter)
        self.average = {n: p.detach().clone() for n, p in parameters.items()} if ema else {}

    def update(self, lr: float, where: Tensor) -> None:
        """Step the optimizer at one rate, free the gradients, move the average; count nothing.

        Args:
            lr:     learning rate
            where:  () bool, on the parameters' device; where it is False nothing is updated
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # what a gradient scaler says to a fused optimizer, which reads it on the device
        self.optimizer.found_inf = (~where).float()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema:
            weight = (1 - average_decay(self.steps, self.ema)) * where
            for name, average in self.average.items():
                average.lerp_(self.parameters[name].detach(), weight)

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
    """Bytes of each of a part's tensors, in no order, before there is the part."""
    step = torch.zeros(()).nbytes
    moments_and_average = 3 if ema else 2
    return [
        size
        for parameter in parameters
        for size in (step, *[parameter.nbytes] * (1 + moments_and_average))
    ]
