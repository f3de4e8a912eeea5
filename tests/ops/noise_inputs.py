"""Inputs of the ops that draw noise, and what is compared of their results."""

from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops import add_noise, normals, score_loss, uniforms
from dbkernels.ops.philox import Draw, sizes

DRAW = Draw(seed=2**64 - 9, step=2**40 + 3, sample=5)
F32, BF16, F16 = DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LEADING = {"sample": 1, "token": 2}  # dimensions of what is said once of each


class Tensors(NamedTuple):
    prediction: Tensor
    z0: Tensor
    a: Tensor  # of z0: p or alpha
    b: Tensor  # of the noise: q or beta


def tensors(shape, per="sample", dtype=torch.float32, z0_dtype=None):
    """A prediction with a bias, so that a sum of errors is no sum of noise."""
    prediction, z0 = 1 + torch.randn(shape), 3 + torch.randn(shape)
    a, b = 4 * torch.randn(2, *shape[: LEADING[per]])
    return Tensors(prediction.to(dtype), z0.to(z0_dtype or dtype), a, b)


def noise_like(z0, draw=DRAW):
    return normals(draw, *sizes(z0)).view(z0.shape)


def results(f, leaves, *rest, **options):
    """Outputs, and gradients for upstream powers of two, which round nothing again."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    outputs = f(*leaves, *rest, **options)
    y, *others = outputs if isinstance(outputs, tuple) else (outputs,)
    dy = torch.tensor([-2.0, 0.5, 4.0]).repeat(y.numel())[: y.numel()].view(y.shape).to(y)
    return [y.detach(), *others, *torch.autograd.grad(y, leaves, dy)]


def noisy(f, t, draw, **options):
    """z and dz0, of add_noise or its specification; `draw` may be the noise itself."""
    return results(f, [t.z0], t.a, t.b, draw, **options)


def losses(f, t, draw, **options):
    """loss, losses, dprediction and dz0."""
    return results(f, [t.prediction, t.z0], t.a, t.b, draw, **options)


OPS = {
    "normals": lambda draw, t: [normals(draw, *sizes(t.z0))],
    "uniforms": lambda draw, t: [uniforms(draw, len(t.z0))],
    "uniforms of tokens": lambda draw, t: [uniforms(draw, len(t.z0), 5)],
    "add_noise": lambda draw, t: noisy(add_noise, t, draw),
    "score_loss": lambda draw, t: losses(score_loss, t, draw, reduction="sum", mask=t.z0 > 3),
}
