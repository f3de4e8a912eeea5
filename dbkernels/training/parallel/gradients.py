"""Gradients of several processes: averaged where each has all parameters, and their norm."""

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbkernels.training.parallel.placement import HERE_ALONE, Placements, here


class SharedGradients:
    """Averages gradients over the processes that share a batch; alone it leaves them as they are.

    Each is sent when the last micro-batch has made it, while the backward goes on. FSDP2 does so
    itself for parameters that it shares out.

    Args:
        parameters:  that are trained
        placements:  theirs
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] = (), placements: Placements = HERE_ALONE
    ):
        self._placements, self._data = placements, placements.job.data
        self._is_last = False
        self._sent: list[tuple[dist.Work, Tensor]] = []
        if self._data.group is not None:
            for parameter in parameters:
                if not placements.is_shared_out(parameter):
                    parameter.register_post_accumulate_grad_hook(self._send)

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Differentiate the loss of a micro-batch; after the last of a step all are averaged."""
        self._is_last = is_last
        try:
            loss.backward()
            for work, grad in self._sent:
                work.wait()
                grad /= self._data.size
        finally:
            self._is_last = False
            self._sent.clear()

    def _send(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if self._is_last and grad is not None:
            work = dist.all_reduce(grad, group=self._data.group, async_op=True)
            assert work is not None
            self._sent.append((work, grad))

    def clip(self, parameters: Sequence[nn.Parameter], most: float) -> Tensor:
        """Scale gradients so that their norm is no more than `most`, and give what it was, ().

        It is that of the whole gradient, whatever of it this process holds.
        """
        group = self._placements.job.group
        if group is None:
            return nn.utils.clip_grad_norm_(parameters, most)
        moving = [p for p in parameters if p.grad is not None]
        grads = [here(p.grad) for p in moving if p.grad is not None]
        device = grads[0].device if grads else "cpu"
        squares = torch.zeros((), dtype=torch.float32, device=device)
        for parameter, norm in zip(moving, torch._foreach_norm(grads), strict=True):
            squares += norm.float().square() / self._placements.of(parameter).copies
        dist.all_reduce(squares, group=group)
        norm = squares.sqrt()
        # as `clip_grad_norm_` has it
        torch._foreach_mul_(grads, torch.clamp(most / (norm + 1e-6), max=1.0))
        return norm
