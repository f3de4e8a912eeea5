"""How each kernel of dbkernels/ops is launched, for the report on what the compiler made of it.

An entry names an op, a direction, and the arguments of that direction's launcher at given shapes.
The launcher itself then says what the kernel is given, so tiles and grids are written nowhere
twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dbkernels.ops.softmax_gradient import empty_logits

B, T = 32, 256  # at which bytes and time floors are stated
HEAD_DIM = 64
VOCABULARY = 50257  # of GPT-2; odd, and no width of a model
DTYPE = torch.bfloat16  # of the branches
STREAMS = (torch.bfloat16, torch.float32)  # dtypes of the residual stream; autocast has the second
MODULATIONS = 6  # of one layer, side by side in one projection
LAUNCHERS = {
    "fwd": ("_forward_triton", "_fwd_kernel"),
    "bwd": ("_backward_triton", "_bwd_kernel"),
    "sum": ("_backward_triton", "_sum_kernel"),  # of what the programs of a bwd share
    "grad": ("_gradient_triton", "_gradient_kernel"),
}


@dataclass(frozen=True)
class Shapes:
    """What the tensors of a launch look like; they are on no device."""

    D: int
    B: int = B
    stream: torch.dtype = DTYPE

    def empty(self, *shape: int, dtype: torch.dtype = DTYPE) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def residual(self, count: int = 1) -> tuple[Tensor, ...]:
        """(B, T, D) each, of the residual stream or its gradient."""
        shape = self.B, T, self.D
        return tuple(self.empty(*shape, dtype=self.stream) for _ in range(count))

    def tokens(self, count: int = 1, *, width: int = 1) -> tuple[Tensor, ...]:
        """(B, T, width D) each, of a branch."""
        return tuple(self.empty(self.B, T, width * self.D) for _ in range(count))

    def rows(self, F: int, count: int = 1) -> tuple[Tensor, ...]:
        return tuple(self.empty(self.B * T, F) for _ in range(count))

    def modulation(self, count: int) -> tuple[Tensor, ...]:
        """(B, D) each, side by side; a gradient's are the same."""
        return self.empty(self.B, MODULATIONS * self.D).chunk(MODULATIONS, dim=1)[:count]

    def stats(self) -> Tensor:
        return self.empty(self.B, T, 2, dtype=torch.float32)

    def scalars(self) -> Tensor:
        return self.empty(self.B * T, dtype=torch.float32)

    def levels(self) -> Tensor:
        return self.empty(self.B, dtype=torch.float32)

    def draw(self) -> tuple[int, Tensor, int]:
        """Seed, step and sample; not what a compiler would specialise for."""
        return 7, self.empty(dtype=torch.int64), 7

    def head_weights(self) -> tuple[Tensor, Tensor]:
        return self.empty(HEAD_DIM), self.empty(HEAD_DIM)

    def rotary(self) -> Tensor:
        return self.empty(2, T, HEAD_DIM, dtype=torch.float32)

    @property
    def heads(self) -> int:
        return self.D // HEAD_DIM

    @property
    def gated_mlp_width(self) -> int:
        """As many parameters as mlp_width gives, rounded up to whole 128-byte lines of bfloat16."""
        return -(-8 * self.D // (3 * 64)) * 64


@dataclass(frozen=True)
class Case:
    """One kernel with everything that it can be asked for at once."""

    op: str  # its module in dbkernels.ops
    direction: str  # of LAUNCHERS
    arguments: Callable[[Shapes], tuple]  # of the launcher
    # how often the bytes of an argument cross the memory bus, where that is not once
    passes: dict[str, float] = field(default_factory=dict)
    multiple: int = 1  # of which D must be one
    timed: bool = True  # by the benchmark of ops; not where only a part of an op with matmuls
    # whether it works on whole rows of a residual stream, whose dtype may be another
    of_stream: bool = False
    # bytes that a thread moves of a row at once, at least, where its width allows
    access_bytes: int = 16

    @property
    def name(self) -> str:
        return f"{self.op}_{self.direction}"

    @property
    def streams(self) -> tuple[torch.dtype, ...]:
        return STREAMS if self.of_stream else (DTYPE,)


# a warp then moves two whole lines of memory at once, and a thread holds half as much of a row
ROWS = {"of_stream": True, "access_bytes": 8}


def _adaln_norm_bwd(s: Shapes) -> tuple:
    return (
        *(*s.tokens(), *s.residual(2), *s.modulation(2), s.stats()),
        *(*s.residual(), *s.tokens(), *s.modulation(2), True),
    )


def _gated_adaln_norm_bwd(s: Shapes) -> tuple:
    return (
        *(*s.tokens(), *s.residual(2), *s.tokens(), *s.modulation(3), s.stats()),
        *(*s.residual(), *s.tokens(2), *s.modulation(3), True),
    )


def _gated_residual_bwd(s: Shapes) -> tuple:
    return (*s.residual(), *s.tokens(), *s.modulation(1), *s.tokens(), *s.modulation(1))


def _swiglu_bwd(s: Shapes) -> tuple:
    F = s.gated_mlp_width
    bias = s.empty(2 * F)
    return (*s.rows(2 * F), *s.rows(F), bias, *s.rows(2 * F), *s.rows(F), bias)


ENTRIES = [
    Case(
        "adaln_norm",
        "fwd",
        lambda s: (*s.residual(), *s.modulation(2), *s.tokens(), s.stats(), 1e-6, True),
        **ROWS,
    ),
    Case("adaln_norm", "bwd", _adaln_norm_bwd, **ROWS),
    Case(
        "gated_adaln_norm",
        "fwd",
        lambda s: (
            *(*s.residual(), *s.tokens(), *s.modulation(3), *s.residual(), *s.tokens()),
            *(s.stats(), 1e-6, True),
        ),
        **ROWS,
    ),
    Case("gated_adaln_norm", "bwd", _gated_adaln_norm_bwd, **ROWS),
    Case("gated_adaln_norm", "sum", _gated_adaln_norm_bwd, timed=False),
    Case(
        "gated_residual",
        "fwd",
        lambda s: (*s.residual(), *s.tokens(), *s.modulation(1), *s.residual()),
        **ROWS,
    ),
    Case("gated_residual", "bwd", _gated_residual_bwd, **ROWS),
    Case("gelu", "fwd", lambda s: (*s.rows(4 * s.D), s.empty(4 * s.D), *s.rows(4 * s.D))),
    Case(
        "gelu",
        "bwd",
        lambda s: (
            *(*s.rows(4 * s.D, 2), s.empty(4 * s.D), *s.rows(4 * s.D, 2)),
            s.empty(4 * s.D),
        ),
    ),
    Case(
        "swiglu",
        "fwd",
        lambda s: (
            *(*s.rows(2 * s.gated_mlp_width), s.empty(2 * s.gated_mlp_width)),
            *s.rows(s.gated_mlp_width),
        ),
    ),
    Case("swiglu", "bwd", _swiglu_bwd),
    Case(
        "qk_norm_rotary",
        "fwd",
        lambda s: (
            *(*s.tokens(width=3), *s.head_weights(), s.rotary()),
            *(s.empty(s.B, T, 2, s.heads, HEAD_DIM), s.heads, 1e-6),
        ),
        # the values stay where they are, and a table says every angle twice
        passes={"qkv_ptr": 2 / 3, "table_ptr": 1 / 2},
        multiple=HEAD_DIM,
    ),
    Case(
        "qk_norm_rotary",
        "bwd",
        lambda s: (
            *(*s.tokens(2, width=3), *s.head_weights(), s.rotary()),
            *(*s.head_weights(), s.heads, 1e-6),
        ),
        # the gradient is written over
        passes={"qkv_ptr": 2 / 3, "dqkv_ptr": 4 / 3, "table_ptr": 1 / 2},
        multiple=HEAD_DIM,
    ),
    Case(
        "softmax_gradient",
        "grad",
        lambda s: (
            empty_logits(s.B * T, VOCABULARY, DTYPE, "meta"),
            s.empty(s.B * T, dtype=torch.int64),
            *(s.scalars(), s.scalars(), VOCABULARY, -100),
        ),
        passes={"logits_ptr": 3},  # read twice, then written
        timed=False,
    ),
    Case(
        "philox",
        "fwd",
        lambda s: (s.empty(s.B, T * s.D, dtype=torch.float32), *s.draw()),
        timed=False,
    ),
    Case(
        "add_noise",
        "fwd",
        lambda s: (*s.tokens(), s.levels(), s.levels(), *s.tokens(), *s.draw()),
        timed=False,
    ),
    Case(
        "score_loss",
        "fwd",
        lambda s: (
            *(*s.tokens(2), s.levels(), s.levels(), s.levels()),
            *(s.empty(s.B, T, s.D, dtype=torch.bool), *s.tokens(2), s.levels(), *s.draw(), 1.0),
        ),
        timed=False,
    ),
]
CASES = {case.name: case for case in ENTRIES}
