"""An optimizer whose state is a tensor of two others, as torchao's are."""

import torch
from torch import Tensor
from torch.optim import Optimizer


class Halves(Tensor):
    """A tensor as bfloat16 and what is missing to it; ops see the sum."""

    @staticmethod
    def __new__(cls, high, low):
        return Tensor._make_wrapper_subclass(cls, high.shape, device=high.device)

    def __init__(self, high, low):
        self.high, self.low = high, low

    def __tensor_flatten__(self):
        return ["high", "low"], None

    @classmethod
    def __tensor_unflatten__(cls, inside, told, size, stride):
        return cls(**inside)

    def whole(self):
        return self.high.float() + self.low

    def put(self, value):
        self.high.copy_(value)
        self.low.copy_(value - self.high.float())

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


class WrappedMomentum(Optimizer):
    """Momentum, kept in halves."""

    def __init__(self, groups, lr=1e-3):
        super().__init__(groups, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    zeros = torch.zeros_like(p.detach())
                    state["momentum"] = Halves(zeros.bfloat16(), zeros)
                momentum = 0.9 * state["momentum"].whole() + p.grad
                state["momentum"].put(momentum)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_(momentum, alpha=group["lr"])
