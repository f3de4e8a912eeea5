"""Elements of a tensor left out at random, by numbers that are drawn again in the backward.

    y = x / (1 - p)  where w >= p * 2**32,  else 0

with the words w of `philox`, four to a counter and one to an element. Srivastava et al. 2014
(JMLR 15). Words are integers, so every implementation leaves out the same elements. Backward:

    dx = dy / (1 - p)  where w >= p * 2**32,  else 0
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops.backend import checks, noise_tile
from dbkernels.ops.backend.register import register
from dbkernels.ops.philox import Draw, counter_chunks, kernel_draw, noise_launch, philox, sizes
from dbkernels.settings import check_number

PLACES = 2**8 - noise_tile.DROPOUT  # streams of one draw that are left for it


class Dropout(NamedTuple):
    """What a layer leaves out, and by which numbers."""

    branches: float
    """Share of the elements of each branch's output."""
    attention: float
    """Share of the attention's weights."""
    draw: Draw
    """Of the layer's first sample."""

    def after(self, samples: int) -> "Dropout":
        """Of the samples after so many."""
        draw = Draw(self.draw.seed, self.draw.step, self.draw.sample + samples)
        return self._replace(draw=draw)


# kernel


@triton.jit(do_not_specialize=[*noise_tile.DRAW, "threshold"])
def _fwd_kernel(
    x_ptr, y_ptr,  # (B, elements) twice
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements, threshold, scale,
    STREAM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, mask = noise_tile.tile_of_sample(elements, BLOCK)
    at = batch * elements + start + lanes
    words = noise_tile.word_tile(batch, start, step_ptr, sample, key_low, key_high, STREAM, BLOCK)
    word = noise_tile.in_order(*words, BLOCK)
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)

    y = tl.where(word.to(tl.int64) >= threshold, x * scale, 0.0)

    tl.store(y_ptr + at, y, mask=mask)


# launchers: they write into tensors of their caller


def _forward_triton(x, y, seed, step, sample, stream, threshold, scale):
    B, elements = sizes(x)
    grid, options = noise_launch(B, elements)
    words = kernel_draw((seed, step, sample))
    _fwd_kernel[grid](x, y, *words, elements, threshold, scale, STREAM=stream, **options)


def _forward_torch(x, y, seed, step, sample, stream, threshold, scale):
    B, elements = sizes(x)
    x, y = x.view(B, elements), y.view(B, elements)
    draw = seed, step, sample
    for rows, cols, *counter in counter_chunks(draw, B, elements, stream, x.device):
        words = torch.stack(philox(*counter), dim=-1).flatten(1)[:, : cols.stop - cols.start]
        # 0 and not a product, which would be no number where x is none
        y[rows, cols] = (x[rows, cols] * scale).masked_fill_(words < threshold, 0)


# y may be x itself
_forward_op = register(
    "dropout_fwd(Tensor x, Tensor(a!) y, SymInt seed, Tensor step, SymInt sample, int stream,"
    " int threshold, float scale) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)


# autograd


def drop(x: Tensor, p: float, draw: Draw, place: int, *, out: Tensor) -> Tensor:
    """`dropout` of contiguous x into out, which may be x itself."""
    threshold = round(p * 2**32)
    arguments = draw.arguments(*sizes(x), x.device)
    _forward_op(x, out, *arguments, noise_tile.DROPOUT + place, threshold, 1 / (1 - p))
    return out


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p, draw, place):
        ctx.told = p, draw, place
        return drop(x, *ctx.told, out=torch.empty_like(x))

    @staticmethod
    def backward(ctx, dy):
        checks.refuse_double_backward("dropout")
        dy = dy.contiguous()
        return drop(dy, *ctx.told, out=torch.empty_like(dy)), None, None, None


# public


def check_share(name: str, p: float) -> None:
    """A probability with which something is left out."""
    if not 0 <= p < 1:
        raise ValueError(f"{name} must be in [0, 1), got {p}")


def dropout(x: Tensor, p: float, draw: Draw, *, place: int = 0) -> Tensor:
    """Leave out a share of the elements, and scale the others so that the mean stays.

    Args:
        x:      (B, ...)  float32, bfloat16 or float16
        p:      probability that an element is 0, in [0, 1)
        draw:   names the numbers of sample 0; sample b has those of draw.sample + b, however many
                samples there are together
        place:  0 to PLACES - 1, which of a draw's masks; each is independent of the others and of
                the noise
    Returns:
        (B, ...), dtype of x. Nothing is kept for the backward, which draws the mask again.
    Raises:
        ValueError: the dtype, p or place is not among those named, or the draw has not that many
            samples or elements, or its step is on another device.
        RuntimeError: the gradient is differentiated.
    """
    check_share("p", p)
    check_number("place", place, 0, PLACES - 1)
    checks.check_floats(x=x)
    if x.dim() == 0:
        raise ValueError("x must be (B, ...), got a scalar")
    return _Dropout.apply(x.contiguous(), p, draw, place)
