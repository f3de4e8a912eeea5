"""Losses on the residual stream between layers: gradients may be asked for in any order."""

import random

import pytest
import torch
import torch.nn.functional as F
from models.tiny import randomise
from torch import nn

from dbkernels.models.baseline import stock_layer
from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import LENGTH

B, T, D = 2, 3, 12
DEPTH = LENGTH + 2  # a run, and the start of another
SECOND = "Trying to backward through the graph a second time"
each_policy = pytest.mark.parametrize("recompute", POLICIES)


def make_stack(recompute, *, eager=False):
    """Layers, the output of each, and the loss on each output; of the same weights every time."""
    torch.manual_seed(3)
    config = LayerConfig(D, 3, 20, 7, qk_norm=True, recompute=recompute)
    layers, outs = [randomise(AdaLNLayer(config)).double() for _ in range(DEPTH)], []
    for layer in layers:
        layer.run = stock_layer if eager else None
        layer.register_forward_hook(lambda _, args, out: outs.append(out))
    x, c = torch.randn(B, T, D).double() + 2, torch.randn(B, 7).double()
    run_layers(layers, x, c)
    heads = torch.randn(DEPTH, D).double()
    return (
        layers,
        outs,
        [(out @ head).square().mean() for out, head in zip(outs, heads, strict=True)],
    )


def ask(stack, plan):
    """The gradients of the steps of a plan, and what a step raised in their place."""
    layers, outs, losses = stack
    found = []
    for of, which, retain, dropped in plan:
        wanted = [p for index in which for p in layers[index].parameters()]
        loss = sum(losses[index] for index in of)
        try:
            found.append(torch.autograd.grad(loss, wanted, retain_graph=retain))
        except RuntimeError as error:
            assert SECOND in str(error), error
            found.append(None)
        del loss
        if dropped:  # a graph that nobody holds any more
            for held in (outs, losses):
                held[dropped:] = [None] * (DEPTH - dropped)
    return found


def random_plan(seed):
    """Steps of (losses, layers, retain_graph, the first layer whose output is then forgotten)."""
    draw, plan, there = random.Random(seed), [], DEPTH
    for _ in range(draw.randint(2, 5)):
        of = draw.sample(range(there), draw.randint(1, min(2, there)))
        which = draw.sample(range(min(of) + 1), draw.randint(1, min(3, min(of) + 1)))
        dropped = draw.randint(1, there) if draw.random() < 0.2 else 0
        plan.append((of, which, draw.random() < 0.3, dropped if dropped < there else 0))
        there = plan[-1][-1] or there
    return plan


@each_policy
def test_gradients_in_any_order_are_those_of_eager_or_refused_as_there(recompute):
    raised = given = 0
    for seed in range(25):
        plan = random_plan(seed)
        expected = ask(make_stack("none", eager=True), plan)
        actual = ask(make_stack(recompute), plan)
        for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
            where = f"seed {seed}, step {step} of {plan}"
            assert (ours is None) == (theirs is None), where
            raised, given = raised + (theirs is None), given + (theirs is not None)
            for a, b in zip(ours or (), theirs or (), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=where)
    assert raised > 10 and given > 25


@each_policy
def test_layers_and_heads_between_them_train_each_by_its_own_loss(recompute):
    """Every layer's loss is differentiated alone, the first first, as in local learning."""
    found = []
    for eager in (True, False):
        layers, outs, _ = make_stack(recompute, eager=eager)
        torch.manual_seed(5)
        gradients = []
        for layer, out in zip(layers, outs, strict=True):
            head = nn.Linear(D, 2).double()
            loss = F.cross_entropy(head(out.mean(1)), torch.tensor([0, 1]))
            gradients += torch.autograd.grad(loss, [*layer.parameters(), *head.parameters()])
        found.append(gradients)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-9)


def test_what_a_backward_needs_no_more_is_written_over_as_without_such_losses():
    """The gradients of gates and branches take the place of what the layers kept."""
    layers, outs, losses = make_stack("none")
    kept = [t for t in outs[0].grad_fn.saved_tensors if t is not None and t.shape == (B, T, D)]
    before = [t.clone() for t in kept]
    torch.autograd.grad(sum(losses), [p for layer in layers for p in layer.parameters()])
    assert any(not torch.equal(a, b) for a, b in zip(kept, before, strict=True))
