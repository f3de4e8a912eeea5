"""The tracker's peak against the CPU allocator's own events, which no dispatch mode feeds."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from dbkernels.memory.measure import measure_peak

FLOAT = 4  # bytes of a float32


def one_parameter(weight):
    model = nn.Module()
    model.weight = nn.Parameter(weight)
    return model


class Attention(nn.Module):
    """A residual transformer, small but with real attention and dropout."""

    def __init__(self, depth=3, width=64, checkpointed=False):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 4 * width, 0.1, F.gelu, batch_first=True)
            for _ in range(depth)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return x


def attention_step(model, optimizer, x, micro_batches=1, autocast=False):
    def step():
        for part in x.chunk(micro_batches):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (model(part).float() - part).square().mean()
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def bytes_of(tensors):
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors)


def allocator_peak(step):
    """Highest growth over the start, from the CPU allocator's own events."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    events = [e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    deltas = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(deltas, initial=0))


def assert_agrees_with_the_allocator(step, model, optimizers, inputs, tolerance=0.005):
    state = [t for optimizer in optimizers for s in optimizer.state.values() for t in s.values()]
    resident = bytes_of([*model.parameters(), *state, *inputs])
    allocated = resident + allocator_peak(step)
    peak = measure_peak(step, model=model, optimizers=optimizers, inputs=inputs)
    assert abs(peak.total_bytes - allocated) <= tolerance * allocated


@pytest.mark.parametrize(
    "options", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
def test_agrees_with_the_allocator_on_a_transformer_step(checkpointed, options):
    torch.manual_seed(0)
    model, x = Attention(checkpointed=checkpointed), torch.randn(8, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), **options)
    step = attention_step(model, optimizer, x)
    step()
    assert_agrees_with_the_allocator(step, model, [optimizer], [x])


@pytest.mark.parametrize("options", [{"micro_batches": 4}, {"autocast": True}], ids=str)
def test_agrees_with_the_allocator_under(options):
    torch.manual_seed(0)
    model, x = Attention(), torch.randn(8, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step = attention_step(model, optimizer, x, **options)
    step()
    assert_agrees_with_the_allocator(step, model, [optimizer], [x])


def test_two_gradients_of_one_tensor_are_added_in_place():
    model = one_parameter(torch.ones(1000))

    def step():
        ((model.weight * 2).sum() + (model.weight * 3).sum()).backward()
        model.weight.grad = None

    # the parameter and its two gradients, and no third
    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 3
    assert_agrees_with_the_allocator(step, model, [], [])


def test_two_gradients_with_a_graph_of_their_own_are_added_in_a_new_storage():
    model = one_parameter(torch.ones(1000))

    def step():
        loss = (model.weight * 2).sum() + (model.weight * 3).sum()
        torch.autograd.grad(loss, model.weight, create_graph=True)

    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 4
    assert_agrees_with_the_allocator(step, model, [], [])


class _KeepsItsGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kept):
        ctx.kept = kept
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        ctx.kept.append(dy * 2)
        return ctx.kept[0], None


def test_a_gradient_that_is_kept_is_added_to_in_a_new_storage():
    model, kept = one_parameter(torch.ones(1000)), []

    def step():
        # the later node is the first in the backward
        loss = (model.weight * 2).sum() + _KeepsItsGradient.apply(model.weight, kept).sum()
        loss.backward()
        model.weight.grad = None
        kept.clear()

    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 4
    assert_agrees_with_the_allocator(step, model, [], [])


def test_a_gradient_that_is_kept_counts_until_it_is_let_go():
    model, kept = one_parameter(torch.ones(1000)), []

    def step():
        loss = (model.weight * 2).sum() + _KeepsItsGradient.apply(model.weight, kept).sum()
        loss.backward()
        held = torch.zeros(2000)
        kept.clear()
        model.weight.grad = None
        return held

    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 5
    assert_agrees_with_the_allocator(step, model, [], [])


class _AddsOutOfPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 1

    @staticmethod
    def backward(ctx, dy):
        dx = dy * 2
        dx = dx + dy.sum()
        return dx


def test_a_sum_that_a_backward_makes_itself_is_a_new_storage():
    model = one_parameter(torch.ones(1000))

    def step():
        _AddsOutOfPlace.apply(model.weight).sum().backward()
        model.weight.grad = None

    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 3
    assert_agrees_with_the_allocator(step, model, [], [])


def test_a_sum_outside_a_backward_is_a_new_storage():
    @torch.no_grad()
    def step():
        torch.zeros(1000) + torch.ones(1)

    model = one_parameter(torch.ones(1000))
    assert measure_peak(step, model=model).total_bytes // (1000 * FLOAT) == 3
    assert_agrees_with_the_allocator(step, model, [], [])
