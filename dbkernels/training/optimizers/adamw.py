"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) in one kernel for all parameters."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

from dbkernels.training.optimizers.kind import State, Trained, groups_of


class FusedAdamW:
    """torch's fused AdamW, which reads its rate, and whether to step, on the device."""

    name, capturable, by_element = "adamw", True, True
    counts: tuple[str, ...] = ()

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """As `Kind.make`."""
        return [AdamW(groups_of(trained), capturable=captured, fused=True)]

    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """As `Kind.state`."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            "exp_avg": torch.zeros_like(tensor.detach()),
            "exp_avg_sq": torch.zeros_like(tensor.detach()),
        }
