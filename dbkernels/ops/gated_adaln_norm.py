"""From one branch to the next: gate, residual, norm and modulation, in one pass.

    x1 = x + gate[b] * h
    y  = (1 + scale[b]) * x1_hat + shift[b],    x1_hat of `adaln_norm`

Peebles & Xie 2023 (arXiv:2212.09748), section 3.2, adaLN-Zero. Backward, with dx1 of the
residual stream, dx_norm of `adaln_norm` for g = (1 + scale) * dy, and x1 rebuilt from x and h:

    dx     = dx1 + dx_norm
    dh     = gate * dx
    dgate  = sum_t dx * h
    dscale = sum_t dy * x1_hat
    dshift = sum_t dy
"""

from functools import partial

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import (
    NormOptions,
    backward_torch,
    forward_torch,
    launch_backward,
    launch_forward,
    norm_forward,
)
from dbkernels.ops.backend import checks, sums
from dbkernels.ops.backend.register import register

# of a thread, by RowTile.shape: the compiler is held to them, and what it makes does not spill
FORWARD_REGISTERS = {(4, 1): 48, (4, 2): 72, (4, 3): 96, (8, 1): 128, (8, 2): 64, (8, 3): 192}
BACKWARD_REGISTERS = {(4, 1): 96, (4, 2): 96, (4, 3): 128, (8, 1): 128, (8, 2): 64, (8, 3): 255}

# launchers: the kernels and the plain torch are those of adaln_norm


def _forward(launch, x, h, gate, scale, shift, x1, *rest):
    launch((h, gate, x1), x, scale, shift, *rest)


def _backward(launch, dy, dx1, x, h, gate, scale, shift, stats, dx, dh, y, dgate, *rest):
    launch((h, gate, dh, dgate), dy, dx1, x, scale, shift, stats, dx, y, *rest)


_forward_triton = partial(_forward, partial(launch_forward, FORWARD_REGISTERS))
_backward_triton = partial(_backward, partial(launch_backward, BACKWARD_REGISTERS))
_forward_op = register(
    "gated_adaln_norm_fwd(Tensor x, Tensor h, Tensor gate, Tensor scale, Tensor shift,"
    " Tensor(a!)? x1, Tensor(b!) y, Tensor(c!) stats, float eps, bool centred) -> ()",
    triton=_forward_triton,
    torch_=partial(_forward, forward_torch),
)
# of options, x, h, the modulation, and x1, which is written where it is given
gated_adaln_norm_forward = partial(norm_forward, _forward_op)
# dh may be h itself and y, which is written again where it is given, may be dy: each row is read
# before it is written
gated_adaln_norm_backward = register(
    "gated_adaln_norm_bwd(Tensor dy, Tensor? dx1, Tensor x, Tensor h, Tensor gate, Tensor scale,"
    " Tensor shift, Tensor stats, Tensor(a!) dx, Tensor(b!) dh, Tensor(c!)? y, Tensor(d!) dgate,"
    " Tensor(e!) dscale, Tensor(f!) dshift, bool centred) -> ()",
    triton=_backward_triton,
    torch_=partial(_backward, backward_torch),
    scratch=lambda dy, dx1, x, *_: sums.scratch_of_samples(x, BACKWARD_REGISTERS, 3),
)


# autograd


class _GatedAdaLNNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, h, gate, scale, shift, options):
        x1 = torch.empty_like(x)
        y, stats = gated_adaln_norm_forward(options, x, h, gate, scale, shift, x1)
        ctx.save_for_backward(x, h, gate, scale, shift, stats)
        ctx.centred = options.centred
        return x1, y

    @staticmethod
    def backward(ctx, dx1, dy):
        checks.refuse_double_backward("gated_adaln_norm")
        saved = ctx.saved_tensors
        dx, dh, *dmodulation = map(torch.empty_like, saved[:5])
        into = dx, dh, None, *dmodulation
        gated_adaln_norm_backward(dy.contiguous(), dx1.contiguous(), *saved, *into, ctx.centred)
        return dx, dh, *dmodulation, None


# public


def gated_adaln_norm(
    x: Tensor,
    h: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Add a branch's gated output to the residual stream, normalise and modulate for the next.

    Args:
        x:      (B, T, D)  residual stream: float32, bfloat16 or float16
        h:      (B, T, D)  branch output, of one of these dtypes
        gate:   (B, D) per sample or (B, T, D) per token; 0 closes the branch
        scale:  as gate; 0 leaves the normalised token as it is. Affine norms: `fold_affine`
        shift:  as gate; shape, strides and dtype of all three are equal
        norm:   "layer", or "rms", which does not subtract the mean
        eps:    added to the variance, so in units of x**2
    Returns:
        The residual stream x1 (B, T, D) in the dtype of x, and y (B, T, D) in that of h.
    Raises:
        ValueError: a shape, stride, dtype or device disagrees, D > MAX_D, or norm is unknown.
        RuntimeError: the gradient is differentiated.
    """
    options = NormOptions(eps, checks.check_norm(norm), h.dtype)
    modulation = {"gate": gate, "scale": scale, "shift": shift}
    rows = checks.rows_of_samples({"x": x, "h": h}, modulation)
    x1, y = _GatedAdaLNNorm.apply(*rows, options)
    return checks.as_tokens(x1, x), checks.as_tokens(y, x)
