"""The ops over rows and attention, and inputs on which their tests go over all of them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from accuracy import upstream_of, with_grads
from torch import Tensor

from dbkernels import ops
from dbkernels.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
F32, BF16, F16 = DTYPES


def modulated(names, shape, dtype=F32, *, offset=0.0, per_token=False, **options):
    """x, h where it is named, and slices of a modulation of width 6 D, as the model passes them."""
    B, T, D = shape
    tensors = {"x": offset + torch.randn(B, T, D), "h": torch.randn(B, T, D)}
    modulation = 0.5 * torch.randn((B, T, 6 * D) if per_token else (B, 6 * D))
    _, _, gate, shift, scale, _ = modulation.to(dtype).chunk(6, dim=-1)
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    tensors |= {"gate": gate, "scale": scale, "shift": shift}
    return [tensors[name] for name in names], options


def projected(names, shape, dtype=F32, *, offset=0.0, biased=True):
    """h wide enough to reach both tails, and a bias of columns far apart.

    With an offset h and bias nearly cancel: their sum in the dtype of h would be rounded.
    """
    h = (2 * torch.randn(shape) - offset).to(dtype)
    return [h, (torch.randn(shape[-1]) + offset).to(dtype)][: 1 + biased], {}


def rotary_table(positions, d):
    angle = positions[:, None] * 100.0 ** -torch.linspace(0, 1, d // 2 + 1)[:-1]
    return torch.stack([angle.cos(), angle.sin()]).repeat(1, 1, 2)


def by_heads(names, shape, dtype=F32, *, offset=0.0, normed=True, rotated=True):
    """qkv, the weights of both norms and a table that starts at position 3."""
    B, T, H, d = shape
    qkv = (offset + torch.randn(B, T, 3 * H * d)).to(dtype)
    # far from 1 and unlike each other, so that no weight can stand in for another
    weights = [(1.5 + torch.randn(d)).to(dtype), (0.5 * torch.randn(d) - 1).to(dtype)]
    table = rotary_table(3 + torch.arange(T), d) if rotated else None
    return [qkv, *weights][: 3 if normed else 1], {"heads": H, "rotary": table}


def queries_keys_values(names, shape, dtype=F32, **options):
    """Slices of a projection, as the model passes them."""
    B, T, H, d = shape
    # keys and values far from zero mean: a dropped row sum of the backward would show
    qkv = torch.randn(B, T, 3, H, d) + torch.tensor([0.0, 1.0, 3.0])[:, None, None]
    return list(qkv.to(dtype).unbind(2)), options


def on_heads(op):
    """qk_norm_rotary of tensors that have gradients, in order."""

    def f(qkv, q_weight=None, k_weight=None, *, heads, **options):
        return op(qkv, heads, q_weight=q_weight, k_weight=k_weight, **options)

    return f


@dataclass(frozen=True)
class RowOp:
    """One op, and what is particular to it in a test of all."""

    name: str
    arguments: tuple[str, ...]
    make: Callable  # (arguments, shape, dtype, **variant), its tensors and options
    shapes: tuple[tuple[int, ...], ...]
    variants: tuple[dict, ...]  # at every shape
    corners: tuple[tuple[tuple[int, ...], dict], ...] = ()  # a shape, and a variant at it alone
    optional: tuple[dict, ...] = ({},)  # with and without the arguments that need not be given
    mixed: tuple[tuple[torch.dtype, ...], ...] = ()  # dtypes of the arguments
    rounding: tuple[float, float] = (2e-6, 1e-5)  # rtol on top of a half unit, and atol
    small: tuple[int, ...] = (2, 9, 40)
    kept: tuple[str, ...] | None = None  # by the backward; None is all arguments
    stats: bool = False  # whether it keeps two numbers a token, too

    def cases(self, third: int | None = None) -> list[tuple[tuple[int, ...], dict]]:
        """A shape and a variant each: all, or a third, in which each shape has another variant."""
        grid = product(enumerate(self.shapes), enumerate(self.variants))
        placed = [(s + v, shape, variant) for (s, shape), (v, variant) in grid]
        placed += [(i, *corner) for i, corner in enumerate(self.corners)]
        return [case for place, *case in placed if third is None or place % 3 == third]

    def inputs(self, shape=None, dtype=F32, **variant) -> tuple[list[Tensor], dict]:
        return self.make(self.arguments, shape or self.small, dtype, **variant)

    @property
    def fused(self) -> Callable:
        op = getattr(ops, self.name)
        return on_heads(op) if self.make is by_heads else op

    @property
    def specification(self) -> Callable:
        op = getattr(reference, self.name)
        return on_heads(op) if self.make is by_heads else op


# offset 30: with zero-mean inputs a kernel that saves mean and rstd in bfloat16 passes
NORM_VARIANTS = (
    {},
    {"offset": 30.0},
    {"norm": "rms", "eps": 0.3, "offset": 3.0},
)
PER_TOKEN = (
    ((1, 1, 1), {"per_token": True}),
    ((2, 7, 65), {"per_token": True}),
    ((2, 7, 65), {"per_token": True, "norm": "rms"}),
)
MIXED = (
    (F32, BF16, BF16),
    (F32, BF16, F32),
    (BF16, BF16, F32),
    (BF16, F32, F16),
    (F16, F16, F16),
)
BIAS_MIXED = ((F32, BF16), (BF16, F32), (F16, F16), (BF16, F16))


def activation(name, halves, atol):
    # (1, 1) smallest; 7 and 37 leave a ragged last tile of rows; all but 512 and 1024 leave masked
    # columns; 600, and 1200 in halves, have three column tiles
    shapes = (1, halves), (7, 64), (5, 512 * halves), (37, 300), (2, 9, 600 * halves)
    biased = ({}, {"biased": False})
    return RowOp(
        name, ("h", "bias"), projected, shapes, biased, optional=biased, mixed=BIAS_MIXED,
        rounding=(0.0, atol),
    )  # fmt: skip


ROW_OPS = (
    # (1, 1, 1) smallest; 7 and 11 leave a ragged last split and a ragged last tile; 50, 64, 257 and
    # 1152 leave masked lanes; 257 has several tiles to a program, 1152 three pieces to a row
    RowOp(
        "adaln_norm",
        ("x", "scale", "shift"),
        modulated,
        ((1, 1, 1), (2, 7, 64), (2, 7, 50), (3, 11, 257), (2, 3, 1152)),
        NORM_VARIANTS,
        PER_TOKEN,
        mixed=tuple((x, m, m) for x, _, m in MIXED),
        stats=True,
    ),
    RowOp(
        "gated_adaln_norm",
        ("x", "h", "gate", "scale", "shift"),
        modulated,
        ((1, 1, 1), (2, 7, 48), (2, 5, 257), (1, 3, 1152)),
        NORM_VARIANTS,
        PER_TOKEN,
        mixed=tuple((x, h, m, m, m) for x, h, m in MIXED),
        stats=True,
    ),
    RowOp(
        "gated_residual",
        ("x", "h", "gate"),
        modulated,
        ((1, 1, 1), (2, 7, 48), (3, 19, 257), (2, 3, 1152)),
        ({}, {"offset": 30.0}),
        PER_TOKEN[:2],
        mixed=MIXED,
        rounding=(1e-6, 1e-6),
        kept=("h", "gate"),
    ),
    activation("gelu", 1, 2e-6),
    activation("gelu_exact", 1, 2e-6),
    activation("swiglu", 2, 1e-5),
    # B, T, H, d: one token; halves of 3, 5 and 20 leave idle lanes; the last has several tiles to a
    # program, and the tokens of its programs do not end with a tile or with a sample. Offset 30
    # gives heads whose rms is far from their spread
    RowOp(
        "qk_norm_rotary",
        ("qkv", "q_weight", "k_weight"),
        by_heads,
        ((2, 1, 4, 10), (2, 5, 3, 6), (3, 11, 3, 8), (2, 33, 5, 40)),
        ({}, {"offset": 30.0}),
        (
            ((2, 5, 3, 6), {"normed": False}),
            *(((2, 5, 3, d), {"rotated": False}) for d in (1, 2, 6, 7)),
        ),
        optional=({}, {"normed": False}),
        mixed=((BF16, F32, F32), (F32, BF16, BF16)),
        small=(2, 9, 2, 8),
    ),
)
# one token; fewer tokens than a tile of the kernels; more than one
ATTENTION = RowOp(
    "attention",
    ("q", "k", "v"),
    queries_keys_values,
    ((1, 1, 1, 8), (2, 5, 3, 8), (3, 70, 2, 16)),
    ({}, {"causal": True}),
    optional=({}, {"causal": True}),
    small=(2, 9, 2, 8),
)
# a sample in two streams; heads of 5 leave idle lanes
TWO_STREAM = RowOp(
    "two_stream_attention",
    ("q", "k", "v"),
    queries_keys_values,
    ((6, 1, 4, 8), (4, 7, 3, 5), (6, 70, 2, 16)),
    ({},),
    small=(2, 9, 2, 8),
)
ROW_OPS_BY_NAME = {op.name: op for op in ROW_OPS}


def outputs_of(f: Callable, args: list[Tensor], **options) -> tuple[Tensor, ...]:
    outputs = f(*args, **options)
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def results(f: Callable, args: list[Tensor], upstream=upstream_of, **options) -> tuple[Tensor, ...]:
    """The outputs and the gradient in every argument."""
    return with_grads(partial(f, **options), *args, upstream=upstream)
