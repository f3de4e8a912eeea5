"""Small networks and their steps, whose bytes can be counted by hand."""

import itertools

import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

B, D, FLOAT = 6, 8, 4  # FLOAT: bytes of a float32


def one_parameter(count=10):
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(count))
    return model


class Stack(nn.Module):
    """Layers of which each may be checkpointed."""

    def __init__(self, layers, checkpointed):
        super().__init__()
        self.layers, self.checkpointed = nn.ModuleList(layers), checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def chain(depth, checkpointed=False):
    """Linear and relu, some layers deep; one (B, D) storage saved per layer."""
    return Stack((nn.Sequential(nn.Linear(D, D), nn.ReLU()) for _ in range(depth)), checkpointed)


def transformer(depth=3, width=64, checkpointed=False):
    """A residual transformer, small but with real attention and dropout."""
    kind = nn.TransformerEncoderLayer
    layers = (kind(width, 4, 4 * width, 0.1, F.gelu, batch_first=True) for _ in range(depth))
    return Stack(layers, checkpointed)


def train_step(model, optimizer, x, micro_batches=1, autocast=False):
    """A step whose gradients are gone when it ends."""

    def step():
        for part in x.chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (model(part).float() - part).square().mean()
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def allocator_peak(step):
    """Highest growth over the start, from the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    deltas = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(deltas, initial=0))


def training(width=64, batch=256):
    """A step of a network of somebody's own, and whose tensors are its."""
    model = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x = torch.zeros(batch, width)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, {"model": model, "optimizers": [optimizer], "inputs": [x]}
