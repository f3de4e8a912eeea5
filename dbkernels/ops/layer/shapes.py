"""What the weights of one stream of a layer must be."""

import torch

from dbkernels.ops.backend import checks
from dbkernels.ops.layer.linear import check_adapter
from dbkernels.ops.layer.stacked import Stacked
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.settings import check_choice

PROJECTIONS = ("qkv", "out", "fc1", "fc2")
ATTENTION = ("qkv", "out")
KEYS = ("qkv",)
CROSS = ("cross_q", "cross_kv", "cross_out")


def check_weights(
    name: str,
    w: LayerWeights,
    D: int,
    width: int,
    d: int,
    *,
    mlp: str,
    has: tuple[str, ...] = PROJECTIONS,
    C: int | None = None,
) -> None:
    """Shapes, one dtype, and adapters that fit.

    Args:
        name:   goes before each weight's own
        w:      of the stream
        D:      width of the stream
        width:  of all heads together
        d:      of a head
        mlp:    which one
        has:    the projections that there are to be, of PROJECTIONS; of the others all is None
        C:      width of the other sequence; None is a layer without cross-attention
    Raises:
        ValueError: one is of another shape or dtype, is missing, or is not for this stream, or
            ranks are given that share what they cannot.
    """
    _check_ranks(name, w)
    first = 0 if w.fc1_weight is None else len(w.fc1_weight)
    hidden = 0 if w.fc2_weight is None else w.fc2_weight.shape[-1]
    expected = LayerWeights(
        (3 * width, D), (3 * width,), (D, width), (D,),
        (2 * hidden if mlp == "swiglu" else hidden, D), (first,), (D, hidden), (D,), (d,), (d,),
        (width, D), (width,), (2 * width, C), (2 * width,), (D, width), (D,),
    )._asdict()  # fmt: skip
    has = has if C is None else (*has, *CROSS)
    for projection in (*PROJECTIONS, *CROSS):
        weight, bias = (f"{projection}_{kind}" for kind in ("weight", "bias"))
        if projection not in has:
            for each in (weight, bias):
                if getattr(w, each) is not None:
                    raise ValueError(f"{name}{each} must be None here, got a tensor")
        elif getattr(w, weight) is None:
            raise ValueError(f"{name}{weight} must be {expected[weight]}, got None")
    for field, t in w._asdict().items():
        if field in ("adapters", "ranks") or t is None:
            continue
        checks.check_shape(expected[field], **{f"{name}{field}": t})
        if t.dtype != w.qkv_weight.dtype:
            raise ValueError(
                f"{name}{field} must have the dtype of qkv_weight, {w.qkv_weight.dtype}, "
                f"got {t.dtype}"
            )
    for adapter in w.adapters:
        check_choice("projection of an adapter", adapter.projection, has)
        check_adapter(adapter, getattr(w, f"{adapter.projection}_weight"))


def _check_ranks(name: str, w: LayerWeights) -> None:
    """Of a layer on several ranks all is cut before it is stacked, adapted or compiled: none is."""
    if w.ranks is None:
        return
    if w.adapters:
        raise ValueError(f"{name}adapters must be none with ranks, got {len(w.adapters)}")
    for field, t in w._asdict().items():
        if isinstance(t, Stacked):
            raise ValueError(f"{name}{field} must be a tensor with ranks, got a Stacked")
    if torch.compiler.is_compiling():
        raise ValueError(f"{name}ranks must be None under torch.compile, got {w.ranks.size} ranks")
