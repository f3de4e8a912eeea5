"""What the public functions of this room refuse, with the name, the expected and the got."""

from typing import Literal, get_args

import torch
from torch import Tensor

from dbkernels.ops.backend.register import implementation
from dbkernels.ops.backend.tile import MAX_D
from dbkernels.settings import check_choice

Norm = Literal["layer", "rms"]
Reduction = Literal["mean", "sum", "none"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_norm(norm: str) -> bool:
    """Whether the norm subtracts the mean."""
    check_choice("norm", norm, get_args(Norm))
    return norm == "layer"


def check_reduction(reduction: str) -> None:
    check_choice("reduction", reduction, get_args(Reduction))


def check_shape(shape: tuple[int, ...], letters: str = "", **tensors: Tensor | None) -> None:
    """That of each tensor, which errors tell in letters too; None was not given."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.shape != shape:
            expected = f"{letters} = {tuple(shape)}" if letters else tuple(shape)
            raise ValueError(f"{name} must be {expected}, got {tuple(tensor.shape)}")


def check_heads(
    q_weight: Tensor | None, k_weight: Tensor | None, rotary: Tensor | None, T: int, d: int
) -> None:
    """What is done to heads of d elements, of T tokens."""
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together, got one of them")
    if rotary is not None and d % 2:
        raise ValueError(f"the head width must be even to be rotated, got {d}")
    check_shape((d,), "(d,)", q_weight=q_weight, k_weight=k_weight)
    check_shape((2, T, d), "(2, T, d)", rotary=rotary)
    if rotary is None:
        return
    if rotary.dtype != torch.float32:
        raise ValueError(f"rotary must be of torch.float32, got {rotary.dtype}")
    if rotary.requires_grad:
        raise ValueError("rotary must not require a gradient: none is computed for it")


def check_floats(**tensors: Tensor | None) -> None:
    """One device, and dtypes that its kernels take; None is a tensor that was not given."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    devices = {tensor.device for tensor in given.values()}
    if len(devices) > 1:
        names = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"{_list(given)} must be on one device, got {names}")
    for name, tensor in given.items():
        _check_dtype(name, tensor.dtype, tensor.device)


def result_dtype(dtype: torch.dtype | None, like: Tensor) -> torch.dtype:
    """What was asked for, which kernels must be able to write; None is the dtype of a tensor."""
    if dtype is None:
        return like.dtype
    _check_dtype("dtype", dtype, like.device)
    return dtype


def statistics_dtype(x: Tensor) -> torch.dtype:
    """float32; float64 for the float64 that plain torch also takes."""
    return torch.promote_types(x.dtype, torch.float32)


def check_tokens(**tensors: Tensor) -> None:
    """(B, T, D) each, one shape, a width that a row's tile can hold."""
    first = next(iter(tensors.values()))
    if first.dim() != 3 or not _one_shape(tensors):
        raise ValueError(f"{_list(tensors)} must be (B, T, D), got {_shapes(tensors)}")
    if not 1 <= first.shape[-1] <= MAX_D:
        raise ValueError(f"D must be 1 to {MAX_D}, got {first.shape[-1]}")


def check_modulation(x: Tensor, **tensors: Tensor) -> None:
    """Per sample (B, D) or per token (B, T, D), and all of them alike."""
    B, T, D = x.shape
    first = next(iter(tensors.values()))
    if not _one_shape(tensors) or tuple(first.shape) not in ((B, D), (B, T, D)):
        raise ValueError(
            f"{_list(tensors)} must be (B, D) = ({B}, {D}) or (B, T, D) = ({B}, {T}, {D}), "
            f"got {_shapes(tensors)}"
        )
    kinds = [(tensor.dtype, tensor.stride()) for tensor in tensors.values()]
    if first.stride(-1) != 1 or any(kind != kinds[0] for kind in kinds):
        raise ValueError(
            f"{_list(tensors)} must be slices of one modulation tensor: equal dtypes, equal "
            "strides, the last 1, got " + _list(f"{dtype} {stride}" for dtype, stride in kinds)
        )


def rows_of_samples(tokens: dict[str, Tensor], modulation: dict[str, Tensor]) -> list[Tensor]:
    """Check x and what else is (B, T, D), and its modulation; all of them by sample, each of
    which has a row of the modulation.
    """
    check_floats(**tokens, **modulation)
    check_tokens(**tokens)
    check_modulation(tokens["x"], **modulation)
    samples = [tensor.contiguous() for tensor in tokens.values()]
    if next(iter(modulation.values())).dim() == 3:  # of each token, and then a token is a sample
        samples = [x.view(-1, 1, x.shape[-1]) for x in samples]
    return [*samples, *map(as_rows, modulation.values())]


def as_rows(modulation: Tensor) -> Tensor:
    """(B, D) or (B, T, D) as (samples, D)."""
    # flatten makes no view, and no node of the graph, where there is nothing to do
    return modulation.flatten(0, -2)


def as_tokens(y: Tensor, x: Tensor) -> Tensor:
    """What `rows_of_samples` made of x, or a result of its shape, in the shape of x."""
    return y if y.shape == x.shape else y.view(x.shape)


def refuse_double_backward(op: str) -> None:
    """Gradients are written by kernels that autograd cannot see into."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"{op} has no second derivative: call backward without create_graph=True"
        )


def _check_dtype(name: str, dtype: torch.dtype, device: torch.device) -> None:
    if dtype in DTYPES:
        return
    # plain torch also runs in float64, which is how a gradient is checked by differences
    dtypes = (*DTYPES, torch.float64) if implementation(device) == "torch" else DTYPES
    if dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise ValueError(f"{name} must be one of {names}, got {dtype}")


def _one_shape(tensors: dict[str, Tensor]) -> bool:
    # no set of shapes: torch 2.11 cannot compile one of sizes that vary
    first = next(iter(tensors.values()))
    return all(tensor.shape == first.shape for tensor in tensors.values())


def _shapes(tensors: dict[str, Tensor]) -> str:
    return _list(map(str, sorted({tuple(tensor.shape) for tensor in tensors.values()})))


def _list(names) -> str:
    return " and ".join(names)
