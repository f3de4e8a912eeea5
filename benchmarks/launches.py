"""Kernels that a GPU would launch in a run of fake tensors, counted op by op.

Views, metadata and allocations launch none, an op of torch one unless a rule here says otherwise;
the rules are those of torch's sources. What a library decides by itself is not counted: the second
kernel of a matmul that cuBLAS splits, the clearing of a semaphore in a reduction of many rows.

    matmul with a bias  one, by cublasLt, where the bias is a dense vector (Blas.cpp); else its
                        copy into the result comes first
    cat, stack          one to 128 dense tensors, or to 64 that are not (Shape.cu), of at most 4
                        dimensions; else a copy of each
    _foreach_copy_      one to 320 chunks of 65536 elements or 64 pairs (MultiTensorApply.cuh), of
                        sources of one dtype, copies of one dtype and equal dense strides; else a
                        copy of each (ForeachBinaryOpList.cu). Other _foreach ops have no rule
    slice, select       two backward: zeros, and a copy into them
    flash attention     forward one; backward three: the row sums of dout * out, the gradients, the
                        cast of dq from float32 (flash_bwd_launch_template.h)
    memory-efficient    in float32: forward one; backward four: a product, its row sums, their
                        copy in another order, the gradients (attention_backward.cu)
    an op of dbkernels  one, and one more where programs share sums, which it reduces
"""

import math
from collections.abc import Callable

import torch
from layer_case import Competitor, LayerCase, LayerStep, make_inputs
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.memory.allocator import Target
from dbkernels.ops.backend.register import dry_run_on_gpu, scratch_bytes

_aten = torch.ops.aten

CAT_DENSE, CAT_STRIDED, CAT_DIMS = 128, 64, 4
CHUNK, CHUNKS, PAIRS = 65536, 320, 64  # of a multi-tensor copy: elements; of one launch

# ops whose result is new memory with nothing in it, or the old memory under an unmarked name
_NONE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view"}
_NONE |= {"is_same_size", "promote_types"}


class Launches(TorchDispatchMode):
    """Counts while it is entered: total, and by name of op in order of first use."""

    def __init__(self) -> None:
        super().__init__()
        self.by_op: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.by_op.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if count := launches(func, args, out):
            self.by_op[func.name()] = self.by_op.get(func.name(), 0) + count
        return out


def launches(func: OpOverload, args: tuple, out: object) -> int:
    """Kernels of one call of an op.

    Args:
        func:  that was called
        args:  with these; what is given by name matters to none
        out:   what it returned
    Raises:
        ValueError: a _foreach op without a rule.
    """
    if func.namespace == "dbkernels":
        return 1 + bool(scratch_bytes(func, args))
    name = func._schema.name.partition("::")[2]
    if func.namespace == "prim" or name in _NONE or _is_view(func):
        return 0
    if name in _RULES:
        return _RULES[name](args, out)
    if name.startswith("_foreach"):
        raise ValueError(f"launches of {func.name()} are unknown")
    return 1


def _is_view(func: OpOverload) -> bool:
    returned = [result.alias_info for result in func._schema.returns]
    return bool(returned) and all(alias and not alias.is_write for alias in returned)


def _addmm(args: tuple, out: Tensor) -> int:
    bias = args[0]
    return 1 if bias is out or (bias.dim() == 1 and bias.is_contiguous()) else 2


def _stack(args: tuple, out: Tensor) -> int:
    # along a dimension that the tensors have, stack is cat and a view
    last = (args[1] if len(args) > 1 else 0) in (-1, out.dim() - 1)
    return _joined(args[0], out.dim() if last else out.dim() - 1)


def _joined(tensors: list[Tensor], dims: int) -> int:
    if dims > CAT_DIMS:
        return len(tensors)
    dense = all(tensor.is_contiguous() for tensor in tensors)
    return math.ceil(len(tensors) / (CAT_DENSE if dense else CAT_STRIDED))


def _foreach_copy(args: tuple, _: object) -> int:
    pairs = [(copy, source) for copy, source in zip(*args[:2], strict=True) if copy.numel()]
    dtypes = {(copy.dtype, source.dtype) for copy, source in pairs}
    together = all(
        copy.stride() == source.stride() and torch.ops.aten.is_non_overlapping_and_dense(copy)
        for copy, source in pairs
    )
    if len(dtypes) > 1 or not together:
        return len(pairs)
    count, chunks, tensors = 0, 0, 0
    for copy, _source in pairs:
        tensors += 1
        left = math.ceil(copy.numel() / CHUNK)
        while left:
            taken = min(left, CHUNKS - chunks)
            left, chunks = left - taken, chunks + taken
            if chunks == CHUNKS or (tensors == PAIRS and not left):
                # a tensor that was cut goes on in the next launch
                count, chunks, tensors = count + 1, 0, int(left > 0)
    return count + (chunks > 0)


def _attention_backward(args: tuple, _: object) -> int:
    return 4 if args[1].dtype == torch.float32 else 3


_RULES: dict[str, Callable[[tuple, object], int]] = {
    "addmm": _addmm,
    "addmm_": _addmm,
    "_addmm_activation": _addmm,
    "cat": lambda args, out: _joined(args[0], out.dim()),
    "stack": _stack,
    "_foreach_copy_": _foreach_copy,
    "slice_backward": lambda args, out: 2,
    "select_backward": lambda args, out: 2,
    # on a CPU one op stands for the two that a GPU has, by dtype
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
    "_scaled_dot_product_flash_attention_backward": _attention_backward,
    "_scaled_dot_product_efficient_attention_backward": _attention_backward,
}


def of_layer(
    case: LayerCase, player: Competitor, target: Target
) -> tuple[int, int] | tuple[None, None]:
    """Launches of one call of a layer, and of its backward; None where a compiler makes kernels.

    Args:
        case:    sizes and dtype
        player:  who runs it
        target:  a GPU, whose programs share sums or do not
    """
    if player.impl.startswith("compiled"):
        return None, None
    with FakeTensorMode(), dry_run_on_gpu(target.processors):
        inputs = make_inputs(case, torch.device("cpu"))
        step = LayerStep(player.function(case.num_heads, case.layer), inputs, case.autocast)
        with Launches() as forward:
            out = step.forward()
        with Launches() as backward:
            torch.autograd.grad(out, inputs.leaves, inputs.douts)
    return forward.total, backward.total
