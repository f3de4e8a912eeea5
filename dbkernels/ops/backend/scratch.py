"""What the kernels' launchers allocate inside an op: partial sums, which no dispatcher sees.

Their number is that of the launch itself, on the GPU of a dry run.
"""

from collections.abc import Callable

from torch import Tensor
from torch._ops import OpOverload

from dbkernels.ops._heads import launch
from dbkernels.ops.adaln_norm import BACKWARD_REGISTERS as NORM_REGISTERS
from dbkernels.ops.backend.columns import Share, column_tile, rows_per_column_tile
from dbkernels.ops.backend.tile import Registers, row_launch
from dbkernels.ops.gated_adaln_norm import BACKWARD_REGISTERS as GATED_NORM_REGISTERS
from dbkernels.ops.gated_residual import BACKWARD_REGISTERS as GATE_REGISTERS
from dbkernels.ops.gelu import BACKWARD as GELU
from dbkernels.ops.philox import noise_launch
from dbkernels.ops.qk_norm_rotary import BACKWARD_REGISTERS as HEAD_REGISTERS
from dbkernels.ops.swiglu import BACKWARD as SWIGLU

FLOAT32 = 4  # bytes: of a partial sum
Arguments = dict[str, Tensor | None]


def scratch_bytes(func: OpOverload, args: tuple) -> int:
    """Bytes that one call of an op of this package allocates inside itself and frees again.

    Args:
        func:  any op; those of others, and those without partial sums, have 0
        args:  that it was called with
    """
    if func.namespace != "dbkernels" or func._opname not in _ELEMENTS:
        return 0
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=True)}
    return FLOAT32 * _ELEMENTS[func._opname](named)


# elements of partial sums for one launch; 0 where programs write the outputs themselves


def _of_rows(name: str, registers: Registers, sums: int) -> Callable[[Arguments], int]:
    def elements(named: Arguments) -> int:
        x = named[name]
        if not x.numel() or not (shared := row_launch(x, registers)).samples_are_shared:
            return 0
        return sums * shared.segments(len(x)) * x.shape[-1]

    return elements


def _of_columns(share: Share) -> Callable[[Arguments], int]:
    def elements(named: Arguments) -> int:
        N, F = named["du"].shape
        rows = rows_per_column_tile(N, F, column_tile(F, share), share, named["h"].device)
        return _shared(-(-N // rows), named["dbias"])

    return elements


def _of_heads(named: Arguments) -> int:
    programs = launch(named["dqkv"], named["heads"], HEAD_REGISTERS).programs
    return _shared(programs, named["dq_weight"]) + _shared(programs, named["dk_weight"])


def _of_tiles(named: Arguments) -> int:
    z0 = named["z0"]
    (tiles,), _ = noise_launch(len(z0), z0[0].numel())
    return tiles if tiles > len(z0) else 0


def _shared(programs: int, out: Tensor | None) -> int:
    return 0 if out is None or programs == 1 else programs * out.numel()


_ELEMENTS: dict[str, Callable[[Arguments], int]] = {
    "adaln_norm_bwd": _of_rows("x", NORM_REGISTERS, 2),
    "gated_adaln_norm_bwd": _of_rows("x", GATED_NORM_REGISTERS, 3),
    "gated_residual_bwd": _of_rows("dy", GATE_REGISTERS, 1),
    "gelu_bwd": _of_columns(GELU),
    "swiglu_bwd": _of_columns(SWIGLU),
    "qk_norm_rotary_bwd": _of_heads,
    "score_loss_fwd": _of_tiles,
}
