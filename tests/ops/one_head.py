"""One head and its tokens, small enough for the interpreter, for tests of the loss at its end."""

import importlib

import torch

# by its name as a module, which the function of the same name hides
module = importlib.import_module("dbkernels.ops.linear_cross_entropy")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
NAMES = ["loss", "dx", "dweight", "dbias"]
LEADING, V, D = (2, 9), 70, 12
TILE = 8  # tokens: three chunks, the last of two tokens


def inputs(leading=LEADING, dtype=torch.float32, *, offset=2.0):
    """x far from zero, as its mean reaches every row of the weight's gradient; weight and bias."""
    x, weight = offset + torch.randn(*leading, D), torch.randn(V, D) / 3
    return [t.to(dtype) for t in (x, weight, torch.randn(V))]


def targets(leading=LEADING):
    """Targets of which two are ignored, and weights."""
    target, token_weight = torch.randint(0, V, leading), 0.5 + torch.rand(leading)
    target.view(-1)[[1, 11]] = -100
    return target, token_weight


def op(f, target, x, weight, bias=None, **options):
    return f(x, weight, target, bias=bias, **options)
