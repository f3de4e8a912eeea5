"""Inputs of the score loss, and what is compared of its results."""

import torch

from dbkernels.ops import _noise
from dbkernels.ops.philox import Draw, normals

DRAW = Draw(seed=2**64 - 9, step=2**40 + 3, sample=5)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIGMA = (0.05, 7.0, 80.0)  # noise that is far less and far more than sigma_data


def inputs(shape, dtype=torch.float32, z0_dtype=None):
    """A prediction with a bias, so that a sum of errors is no sum of noise."""
    z0 = (3 + torch.randn(shape)).to(z0_dtype or dtype)
    return (1 + torch.randn(shape)).to(dtype), z0, torch.tensor(SIGMA[: shape[0]])


def noise_like(z0, draw=DRAW):
    B, elements = _noise.sizes(z0)
    return normals(draw, B, elements).view(z0.shape)


def results(f, prediction, z0, *rest, **options):
    """Loss, losses, and gradients for upstream powers of two, which round nothing again."""
    leaves = [t.detach().requires_grad_() for t in (prediction, z0)]
    loss, losses = f(*leaves, *rest, **options)
    dloss = torch.tensor([-2.0, 0.5, 4.0])[: loss.numel()].view(loss.shape).to(loss)
    return loss.detach(), losses, *torch.autograd.grad(loss, leaves, dloss)
