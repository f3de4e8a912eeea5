"""The rate of each update."""

import math
import warnings
from collections.abc import Callable

import torch
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from dbkernels.training.trainer_config import Decay, TrainerConfig

Schedule = Callable[[Optimizer, int], LRScheduler]  # of an optimizer and its updates


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


def rates_of(schedule: Schedule, total: int, lr: float) -> list[float]:
    """The rate of each update that one of torch's schedulers gives.

    It runs to its end once, before anything is trained. So a rate depends on nothing but how many
    updates there were, and a run that goes on needs no state of it.

    Args:
        schedule:  makes a scheduler for an optimizer and its number of updates
        total:     updates
        lr:        that the scheduler begins from
    Raises:
        ValueError: it makes no scheduler, asks for a metric, or moves more than the rate.
    """
    optimizer = SGD([torch.zeros((), dtype=torch.float32, requires_grad=True)], lr=lr, momentum=0.5)
    scheduler, rates, (group,) = schedule(optimizer, total), [], optimizer.param_groups
    if not isinstance(scheduler, LRScheduler):
        kind = type(scheduler).__name__
        raise ValueError(f"schedule must make an LRScheduler of torch, got a {kind}")
    kind, before = type(scheduler).__name__, group["momentum"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is stepped here but the scheduler
        for _ in range(total):
            rates.append(float(group["lr"]))
            try:
                scheduler.step()
            except TypeError as error:
                raise ValueError(f"{kind} must step without a metric, got {error}") from None
    if group["momentum"] != before:
        raise ValueError(f"{kind} must move the rate alone, got one that moves the momentum too")
    return rates


class Rates:
    """The rates of a run, by those of a configuration or of one of torch's schedulers.

    Args:
        config:    of the run
        schedule:  in place of the configuration's warm-up and decay; None is those
    """

    def __init__(self, config: TrainerConfig, schedule: Schedule | None):
        self._config, self._schedule = config, schedule
        self._found: dict[int, list[float]] = {}  # by how many updates there are

    def of(self, step: int, total: int) -> float:
        """The rate of an update of parameters that will have had `total` of them.

        Raises:
            ValueError: as `rates_of`.
        """
        config = self._config
        if self._schedule is not None:
            if total not in self._found:
                self._found[total] = rates_of(self._schedule, total, config.lr)
            # one step more than there are is asked for when all are done
            return self._found[total][min(step, total - 1)]
        # what all blocks share sees every block's steps, so its warm-up is as many times longer
        warmup = config.warmup * total // config.steps
        return learning_rate(step, total, lr=config.lr, warmup=warmup, decay=config.decay)
