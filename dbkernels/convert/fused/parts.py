"""Parts of other people's layers: what each computes, told by its class's name and its settings."""

from typing import NamedTuple

from torch import Tensor, nn

from dbkernels.convert.fused.layer import check_one_dtype
from dbkernels.ops import Stacked

_NORMS = {"LayerNorm": "layer", "RMSNorm": "rms", "RmsNorm": "rms"}
_GELUS = {"GELU": "gelu_exact", "GELUTanh": "gelu"}


class Norm(NamedTuple):
    """What a norm computes."""

    kind: str
    """"layer" or "rms"."""
    eps: float
    """In units of x**2."""


def part(original: nn.Module, name: str) -> nn.Module:
    """The module of a name.

    Raises:
        ValueError: there is none.
    """
    try:
        return original.get_submodule(name)
    except AttributeError:
        raise ValueError(f"a {type(original).__name__} must have {name}, got none") from None


def projections(original: nn.Module, *names: str) -> list[nn.Linear]:
    """Plain linear maps of one dtype.

    Raises:
        ValueError: one is missing, is another module, or has another dtype.
    """
    found = [part(original, name) for name in names]
    for name, linear in zip(names, found, strict=True):
        if type(linear) is not nn.Linear:
            raise ValueError(f"{name} must be a plain Linear, got {linear}")
    check_one_dtype(original, *names)
    return found


def norm_of(original: nn.Module, name: str) -> Norm:
    """What the norm of a name computes, but for its weights.

    Raises:
        ValueError: it is no layer norm or RMS norm with an eps.
    """
    norm = part(original, name)
    kind = _NORMS.get(type(norm).__name__)
    if kind is None:
        raise ValueError(f"{name} must be one of {', '.join(_NORMS)}, got {norm}")
    eps = getattr(norm, "eps", None)
    if not isinstance(eps, float):
        raise ValueError(f"{name}.eps must be a number, got {eps}")
    return Norm(kind, eps)


def norms_of(original: nn.Module, first: str, second: str) -> tuple[Norm, Norm]:
    """What the two norms of these names compute.

    Raises:
        ValueError: one is unknown, or they are not of one kind.
    """
    norms = norm_of(original, first), norm_of(original, second)
    if norms[0].kind != norms[1].kind:
        raise ValueError(
            f"{second} must be of the kind of {first}, {norms[0].kind}, got {norms[1].kind}"
        )
    return norms


def head_width_of(original: nn.Module, name: str, heads: str, rows: int, thirds: int) -> int:
    """Width of a head, of rows that are so many times as many as all heads' together.

    Raises:
        ValueError: the number of heads, an attribute of the module of a name, does not divide them.
    """
    count = getattr(part(original, name), heads, None)
    if not isinstance(count, int) or count < 1 or rows % (thirds * count):
        raise ValueError(f"{name}.{heads} must divide {rows // thirds}, got {count}")
    return rows // (thirds * count)


def qk_eps_of(original: nn.Module, q_name: str, k_name: str) -> float | None:
    """Eps of the RMS norms of queries and keys, with weights; None where neither has a norm.

    Raises:
        ValueError: one has a norm alone, of another kind, or another eps.
    """
    there = [name for name in (q_name, k_name) if _is_there(original, name)]
    if not there:
        return None
    if len(there) == 1:
        raise ValueError(f"{q_name} and {k_name} must be norms or neither, got {there[0]}")
    q, k = (norm_of(original, name) for name in there)
    if (q.kind, k) != ("rms", q):
        raise ValueError(f"{q_name} and {k_name} must be the same RMS norm, got {q} and {k}")
    for name in there:
        if getattr(original.get_submodule(name), "weight", None) is None:
            raise ValueError(f"{name} must have a weight, got none")
    return q.eps


def gelu_of(original: nn.Module, name: str) -> str:
    """Which of the two GELU the module of a name is, as a layer's config has it.

    Raises:
        ValueError: it is no GELU.
    """
    act = part(original, name)
    kind = _GELUS.get(type(act).__name__)
    if kind is None:
        raise ValueError(f"{name} must be one of {', '.join(_GELUS)}, got {act}")
    return "gelu" if getattr(act, "approximate", "none") == "tanh" else kind


def stacked(linears: list[nn.Linear], order: Tensor | None) -> tuple[object, object]:
    """Weight and bias for an op, of the rows of several maps in an order; all have a bias or none.

    Where there is one and no order, they are its own parameters.
    """
    if order is None and len(linears) == 1:
        return linears[0].weight, linears[0].bias
    weight = Stacked(tuple(linear.weight for linear in linears), order)
    if linears[0].bias is None:
        return weight, None
    return weight, Stacked(tuple(linear.bias for linear in linears), order)


def affine_of(norm: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """Weight and bias of a norm, each None where it has none."""
    return getattr(norm, "weight", None), getattr(norm, "bias", None)


def _is_there(original: nn.Module, name: str) -> bool:
    parent, _, key = name.rpartition(".")
    module = getattr(original.get_submodule(parent), key, None)
    return isinstance(module, nn.Module) and type(module) is not nn.Identity
