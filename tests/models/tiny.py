"""Weights for tests of networks, whose gates and heads start at zero and would hide everything."""

from functools import partial

import torch
from torch import nn


def randomise(module, std=0.3):
    """Fill every parameter with normal numbers, norms and biases too; the module itself."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module


def dynamo_alone(monkeypatch):
    """Let torch.compile find and check graphs as ever, and run them op by op: no kernel is made."""
    trace = partial(torch.compile, backend="eager")
    monkeypatch.setattr(
        torch, "compile", lambda function, *, options, **how: trace(function, **how)
    )
