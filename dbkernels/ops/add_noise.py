"""A noisy target, from noise that is drawn where it is used and not stored.

    z = p * z0 + q * noise

with p and q of a sample or of a token: 1 and sigma, those times c_in, or 1 - t and t. The noise is
that of `philox`. Backward:

    dz0 = p * dz
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks, noise_tile
from dbkernels.ops.backend.register import register
from dbkernels.ops.philox import Draw, kernel_draw, noise_chunks, noise_launch, sizes

# coefficients, of `score_loss` too


def check_coefficients(z0: Tensor, **coefficients: Tensor) -> None:
    """z0 is (B, ...), and they are (B,) or (B, T), all alike."""
    if z0.dim() == 0:
        raise ValueError("z0 must be (B, ...), got a scalar")
    B, *T = z0.shape[:2]
    expected = f"(B,) = ({B},)" + (f" or (B, T) = ({B}, {T[0]})" if T else "")
    first = next(iter(coefficients.values()))
    for name, given in coefficients.items():
        shaped = given.shape in (z0.shape[:1], z0.shape[:2]) and given.shape == first.shape
        if not shaped or given.dtype != torch.float32 or given.device != z0.device:
            raise ValueError(
                f"{' and '.join(coefficients)} must be {expected}, torch.float32 on {z0.device}, "
                f"got {name} {tuple(given.shape)} {given.dtype} on {given.device}"
            )
        if given.requires_grad:
            raise ValueError(f"{name} must not require a gradient, because it is given none")


def check_finite(names: tuple[str, ...], *coefficients: Tensor | None) -> None:
    """Of an op's arguments those that have names."""
    for name, given in zip(names, coefficients, strict=False):
        wrong = given[~given.isfinite()] if given is not None else ()
        if len(wrong):
            raise ValueError(f"{name} must be finite, got {wrong[0].item()}")


def of_chunk(entries: Tensor, elements: int, rows: slice, cols: slice) -> Tensor:
    """What (B, ...), one entry to each run of elements, says of a chunk; it may broadcast."""
    of_rows = entries.reshape(len(entries), -1)[rows]
    if of_rows.shape[1] == 1:
        return of_rows
    run = elements // of_rows.shape[1]
    return of_rows[:, torch.arange(cols.start, cols.stop, device=entries.device) // run]


# kernels


@triton.jit(do_not_specialize=noise_tile.DRAW)
def _fwd_kernel(
    z0_ptr, p_ptr, q_ptr,  # (B, elements), (B, elements / run) twice
    z_ptr,                 # (B, elements)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements, run,
    PER_SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, mask = noise_tile.tile_of_sample(elements, BLOCK)
    at = batch * elements + start
    of_run = noise_tile.coefficient_at(batch, start, lanes, elements, run, PER_SAMPLE, BLOCK)
    noise = noise_tile.noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    # after the noise, or they take registers while it is drawn
    p, q = tl.load(p_ptr + of_run), tl.load(q_ptr + of_run)
    z0 = tl.load(z0_ptr + at + lanes, mask=mask, other=0.0).to(tl.float32)

    tl.store(z_ptr + at + lanes, p * z0 + q * noise, mask=mask)


# launchers: they write into tensors of their caller


def _forward_triton(z0, p, q, z, *draw):
    B, elements = sizes(z0)
    grid, options = noise_launch(B, elements)
    run, per_sample = z0.numel() // p.numel(), p.numel() == B
    _fwd_kernel[grid](z0, p, q, z, *kernel_draw(draw), elements, run, per_sample, **options)


def _forward_torch(z0, p, q, z, *draw):
    B, elements = sizes(z0)
    z0, z = z0.view(B, elements), z.view(B, elements)
    p, q = (c.to(torch.promote_types(z0.dtype, c.dtype)) for c in (p, q))
    for rows, cols, noise in noise_chunks(draw, B, elements, z0.device):
        noisy = noise.to(q.dtype).mul_(of_chunk(q, elements, rows, cols))
        z[rows, cols] = noisy.addcmul_(
            z0[rows, cols].to(p.dtype), of_chunk(p, elements, rows, cols)
        )


_forward_op = register(
    "add_noise_fwd(Tensor z0, Tensor p, Tensor q, Tensor(a!) z,"
    " SymInt seed, Tensor step, SymInt sample) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
    check=lambda z0, *given: check_finite(("p", "q"), *given),
)


# autograd


class _AddNoise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z0, p, q, draw, dtype):
        ctx.save_for_backward(p)
        ctx.dtype = z0.dtype
        z = torch.empty_like(z0, dtype=dtype)
        _forward_op(z0, p, q, z, *draw)
        return z

    @staticmethod
    def backward(ctx, dz):
        checks.refuse_double_backward("add_noise")
        (p,) = ctx.saved_tensors
        # p is of few numbers, so plain torch reads and writes dz once too
        p = p.to(torch.promote_types(ctx.dtype, p.dtype))
        p = p.view(*p.shape, *[1] * (dz.dim() - p.dim()))
        dz0 = torch.mul(dz, p, out=torch.empty_like(dz, dtype=ctx.dtype))
        return dz0, None, None, None, None


# public


def add_noise(
    z0: Tensor, p: Tensor, q: Tensor, draw: Draw, *, dtype: torch.dtype | None = None
) -> Tensor:
    """p * z0 + q * noise, in one read and one write; `score_loss` draws the same noise again.

    Args:
        z0:     (B, ...)        clean target: float32, bfloat16 or float16; its gradient passes
        p:      (B,) or (B, T)  float32, of each sample or of each token of z0 (B, T, ...)
        q:      likewise
        draw:   names the noise of sample 0; sample b has that of draw.sample + b
        dtype:  of the result, one that z0 may have; None is that of z0
    Returns:
        (B, ...). Everything is float32 inside, and rounded once.
    Raises:
        ValueError: a shape, dtype or device disagrees, dtype is unknown, p or q requires a
            gradient, or the draw has not that many samples or its step is on another device. Also
            a p or q that is not finite; on a GPU, where to look at it would wait for the device,
            its elements are not finite either.
        RuntimeError: the gradient is differentiated.
    """
    check_coefficients(z0, p=p, q=q)
    checks.check_floats(z0=z0)
    dtype = checks.result_dtype(dtype, z0)
    arguments = draw.arguments(*sizes(z0), z0.device)
    return _AddNoise.apply(z0.contiguous(), p.contiguous(), q.contiguous(), arguments, dtype)
