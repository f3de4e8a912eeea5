"""Random numbers that are a function of what they are for, and so need not be stored.

    counter = (element // 4, sample, step mod 2**32, (step // 2**32) * 2**8 + stream)

With element < 2**34, sample < 2**32, step < 2**56 and stream < 2**8 each of the four words is below
2**32, and step and stream can be read off the last two: no two draws of a seed share a counter, and
Philox (`_philox`) gives different counters different words. A number depends neither on how many
are drawn together nor on where.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dbkernels.ops._noise import (
    DRAW,
    MAX_ELEMENTS,
    SIGMA,
    DrawArguments,
    counter_words,
    kernel_draw,
    key_words,
    load_step,
    noise_chunks,
    noise_launch,
    noise_tile,
    tile_of_sample,
)
from dbkernels.ops._philox import philox, philox_words
from dbkernels.ops.backend.register import register
from dbkernels.ops.backend.tile import LANES

LIMITS = {"seed": 2**64, "step": 2**56, "sample": 2**32}

_SIGMA = tl.constexpr(SIGMA)  # a kernel reads no other kind of global


@dataclass(frozen=True)
class Draw:
    """Names the random numbers of one step."""

    seed: int
    """Of the run, below 2**64."""
    step: int | Tensor
    """Optimizer step, below 2**56.

    A () int64 tensor, on the device of the ops that use it, is read when an op runs: a CUDA graph
    draws anew at each replay. Its value is not checked, which would wait for a GPU.
    """
    sample: int = 0
    """Index of the first sample in the step's effective batch, over micro-batches and ranks."""

    def __post_init__(self):
        for name, limit in LIMITS.items():
            value = getattr(self, name)
            if name == "step" and isinstance(value, Tensor):
                _check_step(value)
                continue
            if not isinstance(value, int) or isinstance(value, bool):
                raise ValueError(f"{name} must be an integer, got {value!r}")
            if not 0 <= value < limit:
                raise ValueError(f"{name} must be in [0, {limit}), got {value}")

    def arguments(
        self, B: int, elements: int = 1, device: torch.device | str | None = None
    ) -> DrawArguments:
        """Seed, step and sample as an op takes them, the seed as a signed integer.

        Args:
            B:         number of samples
            elements:  of each sample
            device:    of the op's tensors, on which the step is then a () int64 tensor
        Raises:
            ValueError: the draw has not that many samples left, no sample so many elements, or the
                step is a tensor on another device.
        """
        if self.sample + B > LIMITS["sample"]:
            raise ValueError(
                f"sample + B must be at most {LIMITS['sample']}, got {self.sample} + {B}"
            )
        if elements > MAX_ELEMENTS:
            raise ValueError(f"a sample must have at most {MAX_ELEMENTS} elements, got {elements}")
        seed = self.seed - 2**64 if self.seed >= 2**63 else self.seed
        return seed, self._step_on(device), self.sample

    def _step_on(self, device: torch.device | str | None) -> Tensor:
        if not isinstance(self.step, Tensor):
            # filled where it lies: nothing is copied, and no one waits
            return torch.full((), self.step, dtype=torch.int64, device=device)
        # of a tensor, because its device has an index where the name of one need not
        device = torch.empty((0,), device=device).device
        if self.step.device != device:
            raise ValueError(f"step must be on {device}, got {self.step.device}")
        return self.step


def _check_step(step: Tensor) -> None:
    if step.shape != () or step.dtype != torch.int64:
        raise ValueError(
            f"step must be an integer or () torch.int64, got {tuple(step.shape)} {step.dtype}"
        )


# kernels


@triton.jit(do_not_specialize=DRAW)
def _fwd_kernel(
    normals_ptr,  # (B, elements)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    elements,
    BLOCK: tl.constexpr,
):  # fmt: skip
    batch, start, lanes, mask = tile_of_sample(elements, BLOCK)
    noise = noise_tile(batch, start, step_ptr, sample, key_low, key_high, BLOCK)
    tl.store(normals_ptr + (batch * elements + start) + lanes, noise, mask=mask)


@triton.jit(do_not_specialize=DRAW)
def _uniform_kernel(
    uniforms_ptr,  # (B,)
    step_ptr, sample, key_low, key_high,  # (), the words of a draw
    B,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    step_low, step_high = load_step(step_ptr, _SIGMA)
    c1 = sample.to(tl.uint32) + row.to(tl.uint32)
    x0, x1, _, _ = philox_words(
        tl.zeros((BLOCK,), tl.uint32), c1, step_low, step_high,
        key_low.to(tl.uint32), key_high.to(tl.uint32),
    )  # fmt: skip
    bits = (x0 >> 5).to(tl.int64) * 2**26 + (x1 >> 6).to(tl.int64)
    tl.store(uniforms_ptr + row, (bits.to(tl.float64) + 0.5) * 2.0**-53, mask=row < B)


# launchers: they write into tensors of their caller


def _forward_triton(normals, *draw):
    B, elements = normals.shape
    grid, options = noise_launch(B, elements)
    _fwd_kernel[grid](normals, *kernel_draw(draw), elements, **options)


def _forward_torch(normals, *draw):
    for rows, cols, noise in noise_chunks(draw, *normals.shape, normals.device):
        normals[rows, cols] = noise


def _uniform_triton(uniforms, *draw):
    grid = (triton.cdiv(len(uniforms), LANES),)
    draw = kernel_draw(draw)
    _uniform_kernel[grid](uniforms, *draw, len(uniforms), BLOCK=LANES, num_warps=LANES // 32)


def _uniform_torch(uniforms, seed, step, sample):
    c1 = torch.arange(sample, sample + len(uniforms), device=uniforms.device)
    x0, x1, _, _ = philox(0, c1, *counter_words(step, SIGMA), *key_words(seed))
    bits = (x0 >> 5) * 2**26 + (x1 >> 6)
    uniforms.copy_((bits.double() + 0.5) * 2.0**-53)


# neither a compiled graph nor one of CUDA makes a constant of a step
_DRAW = "SymInt seed, Tensor step, SymInt sample"
_forward_op = register(
    f"philox_normal(Tensor(a!) normals, {_DRAW}) -> ()",
    triton=_forward_triton,
    torch_=_forward_torch,
)
_uniform_op = register(
    f"philox_uniform(Tensor(a!) uniforms, {_DRAW}) -> ()",
    triton=_uniform_triton,
    torch_=_uniform_torch,
)


# public


def normals(draw: Draw, B: int, elements: int, device: torch.device | str | None = None) -> Tensor:
    """The noise that `add_noise` and `score_loss` use, for whoever wants to look at it.

    Args:
        draw:      names it
        B:         number of samples
        elements:  of each sample
        device:    of the result; it does not change a number by more than rounding
    Returns:
        (B, elements) float32.
    Raises:
        ValueError: the draw has not that many samples or elements, or its step is elsewhere.
    """
    arguments = draw.arguments(B, elements, device)
    noise = torch.empty((B, elements), dtype=torch.float32, device=device)
    if noise.numel():
        _forward_op(noise, *arguments)
    return noise


def uniforms(draw: Draw, B: int, device: torch.device | str | None = None) -> Tensor:
    """One uniform number for each sample, independent of its noise.

    Args:
        draw:    names them
        B:       number of samples
        device:  of the result; it does not change a bit
    Returns:
        (B,) float64 in (0, 1], multiples of 2**-54.
    Raises:
        ValueError: the draw has not that many samples, or its step is elsewhere.
    """
    arguments = draw.arguments(B, device=device)
    numbers = torch.empty((B,), dtype=torch.float64, device=device)
    if B:
        _uniform_op(numbers, *arguments)
    return numbers
