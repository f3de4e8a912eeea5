"""How each kernel of dbkernels/ops is launched, for the report on what the compiler made of it.

A case names an op and a direction, and what the arguments in the schema of that op look like. The
launcher itself then says what the kernel is given, so tiles and grids are written nowhere twice.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from dbkernels.ops.activations import GELU, GELU_EXACT, SWIGLU
from dbkernels.ops.linear_cross_entropy import empty_logits
from dbkernels.ops.table_rows import RUN

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
    "uniform": ("_uniform_triton", "_uniform_kernel"),
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

    def tokens(self, width: int = 1, dtype: torch.dtype = DTYPE) -> Tensor:
        """(B, T, width D), of a branch where no dtype is given."""
        return self.empty(self.B, T, width * self.D, dtype=dtype)

    def floats(self, *shape: int) -> Tensor:
        return self.empty(*shape, dtype=torch.float32)

    @property
    def draw(self) -> dict[str, object]:
        """What a compiler would not specialise for."""
        return {"seed": 7, "step": self.empty(dtype=torch.int64), "sample": 7}


def _modulated(s: Shapes, *, of_branch: str) -> dict[str, object]:
    """Rows of the residual stream, but for some of a branch; and modulation, side by side."""
    row_names = ("x", "x1", "y", "h", "dx", "dx1", "dy", "dh", "dres")
    tensors = {
        name: s.tokens(dtype=DTYPE if name in of_branch.split() else s.stream) for name in row_names
    }
    slices = s.empty(s.B, MODULATIONS * s.D).chunk(MODULATIONS, dim=1)
    for name, part in zip(("gate", "scale", "shift"), slices, strict=False):
        tensors |= {name: part, f"d{name}": part}
    return tensors | {"stats": s.floats(s.B, T, 2), "eps": 1e-6, "centred": True}


_norm = partial(_modulated, of_branch="y dy h dh")
_residual = partial(_modulated, of_branch="h dh")


def _activation(s: Shapes, *, halves: int) -> dict[str, object]:
    # with halves, as many parameters as without, rounded up to whole 128-byte lines of bfloat16
    F = 4 * s.D if halves == 1 else -(-8 * s.D // (3 * 64)) * 64
    wide, u, bias = s.empty(s.B * T, halves * F), s.empty(s.B * T, F), s.empty(halves * F)
    return {"h": wide, "dh": wide, "u": u, "du": u, "bias": bias, "dbias": bias}


def _heads(s: Shapes) -> dict[str, object]:
    H = s.D // HEAD_DIM
    weights = ("q_weight", "k_weight", "dq_weight", "dk_weight")
    return {
        **{name: s.empty(HEAD_DIM) for name in weights},
        **{name: s.tokens(3) for name in ("qkv", "dqkv")},
        **{"qk": s.empty(s.B, T, 2, H, HEAD_DIM), "rotary": s.floats(2, T, HEAD_DIM)},
        **{"heads": H, "eps": 1e-6},
    }


def _streams(s: Shapes) -> dict[str, object]:
    """Of the noisy samples; q, k and v lie side by side."""
    heads = s.B * T, s.D // HEAD_DIM, HEAD_DIM
    q, k, v = s.empty(heads[0], 3, *heads[1:]).unbind(1)
    others = ("o", "out", "dout", "dq_clean", "dq", "dk", "dv")
    return {
        **{"q": q, "k": k, "v": v, "logsumexp": s.floats(s.B, heads[1], T)},
        **{name: s.empty(*heads) for name in others},
    }


def _logits(s: Shapes) -> dict[str, object]:
    return {
        "logits": empty_logits(s.B * T, VOCABULARY, DTYPE, "meta"),
        "target": s.empty(s.B * T, dtype=torch.int64),
        **{"scale": s.floats(s.B * T), "nll": s.floats(s.B * T)},
        **{"V": VOCABULARY, "ignore_index": -100},
    }


def _noise(s: Shapes) -> dict[str, object]:
    return {
        **{name: s.tokens() for name in ("z0", "z", "prediction", "dprediction", "dz0")},
        **{name: s.floats(s.B) for name in ("p", "q", "alpha", "beta", "weight", "losses")},
        **{"mask": s.empty(s.B, T, s.D, dtype=torch.bool), "normals": s.floats(s.B, T * s.D)},
        **{"uniforms": s.empty(s.B, T, dtype=torch.float64), **s.draw, "r": 1.0},
    }


def _dropped(s: Shapes) -> dict[str, object]:
    told = {"stream": 3, "threshold": 2**29, "scale": 1.25}
    return {"x": s.tokens(), "y": s.tokens(), **s.draw, **told}


def _words(s: Shapes) -> dict[str, object]:
    table, tokens = s.empty(VOCABULARY, s.D, dtype=s.stream), s.empty(s.B * T, dtype=torch.int64)
    rows = s.empty(s.B * T, s.D, dtype=s.stream)
    return {
        **{"table": table, "dtable": table, "y": rows, "dy": rows, "unit": True},
        **{"index": tokens, "rows": tokens, "tokens": tokens},
    }


@dataclass(frozen=True)
class Case:
    """One kernel with everything that it can be asked for at once."""

    op: str
    direction: str  # of LAUNCHERS
    tensors: Callable[[Shapes], dict[str, object]]  # by their names in the schema, and scalars
    raw: str | None = None  # name of the registered op, where it is not that of the case
    module: str | None = None  # in dbkernels.ops, where it is not called as the op
    first: tuple = ()  # what its launcher is given before the arguments of the schema
    # how often the bytes of an argument cross the memory bus, where that is not once
    passes: dict[str, float] = field(default_factory=dict)
    multiple: int = 1  # of which D must be one
    timed: bool = True  # by the benchmark of ops; not where only a part of an op with matmuls
    # whether it works on whole rows of a residual stream, whose dtype may be another. A warp then
    # moves two whole lines of memory at once, and a thread holds half as much of a row
    of_stream: bool = False

    @property
    def name(self) -> str:
        return f"{self.op}_{self.direction}"

    @property
    def streams(self) -> tuple[torch.dtype, ...]:
        return STREAMS if self.of_stream else (DTYPE,)

    @property
    def access_bytes(self) -> int:
        """That a thread moves of a row at once, at least, where its width allows."""
        return 8 if self.of_stream else 16

    def arguments(self, shapes: Shapes) -> tuple:
        """Of the launcher, in the order of the schema."""
        tensors = self.tensors(shapes)
        schema = getattr(torch.ops.dbkernels, self.raw or self.name).default._schema
        return tuple(tensors[argument.name] for argument in schema.arguments)


_gelu = partial(Case, "gelu", module="activations", first=(GELU,))
_gelu_exact = partial(Case, "gelu_exact", module="activations", first=(GELU_EXACT,))
_swiglu = partial(Case, "swiglu", module="activations", first=(SWIGLU,))
# the values stay where they are, a table says every angle twice, and the gradient is written over
_HEADS = {"passes": {"qkv_ptr": 2 / 3, "dqkv_ptr": 4 / 3, "table_ptr": 1 / 2}, "multiple": HEAD_DIM}
_LOGITS = {  # read twice, then written
    "passes": {"logits_ptr": 3}, "raw": "softmax_gradient", "module": "linear_cross_entropy"
}  # fmt: skip
_WORDS = {"tensors": _words, "of_stream": True}
_LOOKED_UP = B * T / VOCABULARY  # of the table's rows, at most
_SHARED = _LOOKED_UP / RUN  # of them, whose tokens are in more runs than one, at most
_NORMS = ("adaln_norm", "gated_adaln_norm")
ENTRIES = [
    *(Case(op, way, _norm, of_stream=True) for op in _NORMS for way in ("fwd", "bwd")),
    Case("gated_adaln_norm", "sum", _norm, raw="gated_adaln_norm_bwd", timed=False),
    *(Case("gated_residual", way, _residual, of_stream=True) for way in ("fwd", "bwd")),
    *(_gelu(way, partial(_activation, halves=1)) for way in ("fwd", "bwd")),
    *(_gelu_exact(way, partial(_activation, halves=1)) for way in ("fwd", "bwd")),
    *(_swiglu(way, partial(_activation, halves=2)) for way in ("fwd", "bwd")),
    *(Case("qk_norm_rotary", way, _heads, **_HEADS) for way in ("fwd", "bwd")),
    *(Case("two_stream", w, _streams, multiple=HEAD_DIM, timed=False) for w in ("fwd", "bwd")),
    Case("softmax_gradient", "grad", _logits, timed=False, **_LOGITS),
    *(Case("table_rows", w, passes={"table_ptr": _LOOKED_UP}, **_WORDS) for w in ("fwd", "bwd")),
    Case(
        "table_rows",
        "sum",
        raw="table_rows_bwd",
        timed=False,
        **_WORDS,
        # of the sorted rows those at the ends of a run
        passes={"table_ptr": _SHARED, "dtable_ptr": _SHARED, "rows_ptr": 3 / RUN},
    ),
    Case("philox", "fwd", _noise, raw="philox_normal", timed=False),
    Case("philox", "uniform", _noise, raw="philox_uniform", timed=False),
    Case("dropout", "fwd", _dropped, timed=False),
    Case("add_noise", "fwd", _noise, timed=False),
    Case("score_loss", "fwd", _noise, timed=False),
]
CASES = {case.name: case for case in ENTRIES}
