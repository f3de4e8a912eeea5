"""Weights for tests of networks, whose gates and heads start at zero and would hide everything."""

from torch import nn


def randomise(module, std=0.3):
    """Fill every parameter with normal numbers, norms and biases too; the module itself."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=std)
    return module
