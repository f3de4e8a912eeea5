"""Inputs of the gradient of softmax and of the head above it, and both as functions of tensors."""

import math

import torch
import torch.nn.functional as F
from accuracy import assert_as_accurate_as_eager, assert_op_is_accurate

from dbkernels.ops import linear_cross_entropy, reference
from dbkernels.ops.linear_cross_entropy import empty_logits

IGNORED = -7


def logits(N, V, dtype=torch.float32):
    """Logits far from zero with NaN beside them, targets with an ignored one, and scales."""
    padded = empty_logits(N, V, dtype, None)
    padded.fill_(math.nan)[:, :V] = 30 + 3 * torch.randn(N, V)
    target = torch.randint(0, V, (N,))
    scale = torch.linspace(-1, 2, N)
    if N > 1:
        target[N // 2], scale[N // 2] = IGNORED, 0
    return padded, target, scale


def run(padded, target, scale, V):
    """nll, and the gradient or what else is left of a copy of the logits."""
    logits = padded.clone()
    nll = torch.empty(len(target), dtype=torch.promote_types(padded.dtype, torch.float32))
    torch.ops.dbkernels.softmax_gradient(logits, target, scale, nll, V, IGNORED)
    return nll, logits[:, :V]


def eager(logits, target, scale, dtype):
    logits = logits.detach().to(dtype).requires_grad_()
    wide = logits.to(torch.promote_types(dtype, torch.float32))
    nll = F.cross_entropy(wide, target, ignore_index=IGNORED, reduction="none")
    (dx,) = torch.autograd.grad(nll, logits, scale.to(nll.dtype))
    return nll.detach(), dx


def assert_gradient_accurate(N, V, dtype):
    padded, target, scale = logits(N, V, dtype)
    actual = run(padded, target, scale, V)
    given = padded[:, :V], target, scale
    both = eager(*given, dtype), eager(*given, torch.float64)
    for name, *results in zip(["nll", "dx"], actual, *both, strict=True):
        assert_as_accurate_as_eager(name, *results)
    assert [t.dtype for t in actual] == [torch.float32, dtype]


def loss(target, token_weight=None, *, f=linear_cross_entropy, **options):
    """Of a head, as a function of x, weight and bias."""

    def of(x, weight, bias=None):
        wide = token_weight
        if token_weight is not None and x.dtype == torch.float64:
            wide = token_weight.double()
        return f(x, weight, target, bias=bias, token_weight=wide, **options)

    return of


def assert_loss_accurate(args, *given, **options):
    call = loss(*given, **options)
    assert call(*args).dtype == torch.float32
    specification = loss(*given, f=reference.linear_cross_entropy, **options)
    assert_op_is_accurate(call, specification, args)
