"""What the kernels' launchers allocate inside an op: partial sums, which no dispatcher sees.

The number of programs is that of the launch itself, on the GPU that is rehearsed.
"""

from collections.abc import Callable

from torch import Tensor
from torch._ops import OpOverload

from dbkernels.ops._heads import launch
from dbkernels.ops._noise import noise_launch
from dbkernels.ops._norm import BACKWARD_PROGRAMS as NORM_PROGRAMS
from dbkernels.ops._strip import BACKWARD, rows_per_strip, strip_tile
from dbkernels.ops._tile import row_launch
from dbkernels.ops.gated_residual import BACKWARD_PROGRAMS as GATE_PROGRAMS
from dbkernels.ops.qk_norm_rotary import BACKWARD_PROGRAMS as HEAD_PROGRAMS

FLOAT32 = 4  # bytes: of a partial sum
Arguments = dict[str, Tensor | None]


def scratch_bytes(func: OpOverload, args: tuple) -> int:
    """Bytes that one call of an op of this package allocates inside itself and frees again.

    Args:
        func:  any op; those of others, and those without partial sums, have 0
        args:  that it was called with
    """
    if func.namespace != "dbkernels" or func._opname not in _SUMS:
        return 0
    count, names = _SUMS[func._opname]
    named = {a.name: value for a, value in zip(func._schema.arguments, args, strict=True)}
    elements = sum(named[name].numel() for name in names if named[name] is not None)
    splits = count(named) if elements else 1
    # with one program to a sum there is nothing to add up
    return FLOAT32 * splits * elements if splits > 1 else 0


def _row_splits(name: str, programs: int) -> Callable[[Arguments], int]:
    return lambda named: row_launch(named[name], programs)[0][1]


def _strip_splits(named: Arguments) -> int:
    N, F = named["du"].shape
    rows = rows_per_strip(N, F, strip_tile(F, BACKWARD), BACKWARD, named["h"].device)
    return -(-N // rows)


def _head_splits(named: Arguments) -> int:
    return launch(named["dqkv"], named["heads"], HEAD_PROGRAMS).programs


def _tiles_of_a_sample(named: Arguments) -> int:
    z0 = named["z0"]
    return noise_launch(len(z0), z0[0].numel())[0][0] // len(z0)


# of each op: programs that share one sum, and the outputs that are sums
_SUMS: dict[str, tuple[Callable[[Arguments], int], tuple[str, ...]]] = {
    "adaln_norm_bwd": (_row_splits("x", NORM_PROGRAMS), ("dscale", "dshift")),
    "gated_adaln_norm_bwd": (
        _row_splits("x", NORM_PROGRAMS),
        ("dgate", "dscale", "dshift"),
    ),
    "gated_residual_bwd": (_row_splits("dy", GATE_PROGRAMS), ("dgate",)),
    "gelu_bwd": (_strip_splits, ("dbias",)),
    "swiglu_bwd": (_strip_splits, ("dbias",)),
    "qk_norm_rotary_bwd": (_head_splits, ("dq_weight", "dk_weight")),
    "score_loss_fwd": (_tiles_of_a_sample, ("losses",)),
}
