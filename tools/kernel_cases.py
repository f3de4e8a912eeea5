"""How each kernel of dbkernels/ops is launched, for the report on what the compiler made of it.

An entry names an op, a direction, and the arguments of that direction's launcher at a width D. The
launcher itself then says what the kernel is given, so tiles and grids are written nowhere twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dbkernels.ops.softmax_gradient import empty_logits

B, T = 32, 256  # the shape at which bytes and time floors are stated
HEAD_DIM = 64
VOCABULARY = 50257  # of GPT-2; odd, and no width of a model
DTYPE = torch.bfloat16
MODULATIONS = 6  # of one layer, side by side in one projection
LAUNCHERS = {
    "fwd": ("_forward_triton", "_fwd_kernel"),
    "bwd": ("_backward_triton", "_bwd_kernel"),
    "grad": ("_gradient_triton", "_gradient_kernel"),
}


@dataclass(frozen=True)
class Case:
    """One kernel with everything that it can be asked for at once."""

    op: str  # its module in dbkernels.ops
    direction: str  # of LAUNCHERS
    arguments: Callable[[int], tuple]  # of the launcher, on no device, from D
    # how often the bytes of an argument cross the memory bus, where that is not once
    passes: dict[str, float] = field(default_factory=dict)
    multiple: int = 1  # of which D must be one
    timed: bool = True  # by the benchmark of ops; not where only a part of an op with matmuls

    @property
    def name(self) -> str:
        return f"{self.op}_{self.direction}"


def empty(*shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def tokens(D: int, count: int = 1) -> tuple[Tensor, ...]:
    return tuple(empty(B, T, D) for _ in range(count))


def rows(F: int, count: int = 1) -> tuple[Tensor, ...]:
    return tuple(empty(B * T, F) for _ in range(count))


def modulation(D: int, count: int) -> tuple[Tensor, ...]:
    return empty(B, MODULATIONS * D).chunk(MODULATIONS, dim=1)[:count]


def condition_sums(D: int, count: int) -> tuple[Tensor, ...]:
    return tuple(empty(B, D) for _ in range(count))


def stats() -> Tensor:
    return empty(B, T, 2, dtype=torch.float32)


def scalars() -> Tensor:
    return empty(B * T, dtype=torch.float32)


def levels() -> Tensor:
    return empty(B, dtype=torch.float32)


def draw() -> tuple[int, Tensor, int]:
    """Seed, step and sample; not what a compiler would specialise for."""
    return 7, empty(dtype=torch.int64), 7


def gated_mlp_width(D: int) -> int:
    """As many parameters as mlp_width gives, rounded up to whole 128-byte lines of bfloat16."""
    return -(-8 * D // (3 * 64)) * 64


def head_weights() -> tuple[Tensor, Tensor]:
    return empty(HEAD_DIM), empty(HEAD_DIM)


def rotary() -> Tensor:
    return empty(2, T, HEAD_DIM, dtype=torch.float32)


ENTRIES = [
    Case(
        "adaln_norm",
        "fwd",
        lambda D: (*tokens(D), *modulation(D, 2), *tokens(D), stats(), 1e-6, True),
    ),
    Case(
        "adaln_norm",
        "bwd",
        lambda D: (
            *(*tokens(D, 3), *modulation(D, 2), stats()),
            *(*tokens(D, 2), *condition_sums(D, 2), True),
        ),
    ),
    Case(
        "gated_adaln_norm",
        "fwd",
        lambda D: (*tokens(D, 2), *modulation(D, 3), *tokens(D, 2), stats(), 1e-6, True),
    ),
    Case(
        "gated_adaln_norm",
        "bwd",
        lambda D: (
            *(*tokens(D, 4), *modulation(D, 3), stats()),
            *(*tokens(D, 3), *condition_sums(D, 3), True),
        ),
    ),
    Case("gated_residual", "fwd", lambda D: (*tokens(D, 2), *modulation(D, 1), *tokens(D))),
    Case(
        "gated_residual",
        "bwd",
        lambda D: (*tokens(D, 2), *modulation(D, 1), *tokens(D), *condition_sums(D, 1)),
    ),
    Case("gelu", "fwd", lambda D: (*rows(4 * D), empty(4 * D), *rows(4 * D))),
    Case(
        "gelu",
        "bwd",
        lambda D: (*rows(4 * D, 2), empty(4 * D), *rows(4 * D, 2), empty(4 * D)),
    ),
    Case(
        "swiglu",
        "fwd",
        lambda D: (
            *rows(2 * gated_mlp_width(D)),
            empty(2 * gated_mlp_width(D)),
            *rows(gated_mlp_width(D)),
        ),
    ),
    Case(
        "swiglu",
        "bwd",
        lambda D: (
            *(*rows(2 * gated_mlp_width(D)), *rows(gated_mlp_width(D))),
            empty(2 * gated_mlp_width(D)),
            *(*rows(2 * gated_mlp_width(D)), *rows(gated_mlp_width(D))),
            empty(2 * gated_mlp_width(D)),
        ),
    ),
    Case(
        "qk_norm_rotary",
        "fwd",
        lambda D: (
            *(*tokens(3 * D), *head_weights(), rotary()),
            *(empty(B, T, 2, D // HEAD_DIM, HEAD_DIM), D // HEAD_DIM, 1e-6),
        ),
        # the values stay where they are, and a table says every angle twice
        passes={"qkv_ptr": 2 / 3, "table_ptr": 1 / 2},
        multiple=HEAD_DIM,
    ),
    Case(
        "qk_norm_rotary",
        "bwd",
        lambda D: (
            *(*tokens(3 * D, 2), *head_weights(), rotary()),
            *(*head_weights(), D // HEAD_DIM, 1e-6),
        ),
        # the gradient is written over
        passes={"qkv_ptr": 2 / 3, "dqkv_ptr": 4 / 3, "table_ptr": 1 / 2},
        multiple=HEAD_DIM,
    ),
    Case(
        "softmax_gradient",
        "grad",
        lambda D: (
            *(empty_logits(B * T, VOCABULARY, DTYPE, "meta"), empty(B * T, dtype=torch.int64)),
            *(scalars(), scalars(), VOCABULARY, -100),
        ),
        passes={"logits_ptr": 3},  # read twice, then written
        timed=False,
    ),
    Case("philox", "fwd", lambda D: (empty(B, T * D, dtype=torch.float32), *draw()), timed=False),
    Case(
        "add_noise",
        "fwd",
        lambda D: (*tokens(D), levels(), *tokens(D), *draw(), True, 0.5),
        timed=False,
    ),
    Case(
        "score_loss",
        "fwd",
        lambda D: (
            *(*tokens(D, 2), levels(), levels(), empty(B, T, D, dtype=torch.bool)),
            *(*tokens(D, 2), levels(), *draw(), 0.5, 1.0),
        ),
        timed=False,
    ),
]
CASES = {case.name: case for case in ENTRIES}
