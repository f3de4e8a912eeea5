"""What the weights of one stream of a layer must be."""

from torch import Tensor

from dbkernels.ops.backend import checks
from dbkernels.ops.layer.tensors import LayerWeights

ATTENTION = ("qkv_weight", "qkv_bias", "out_weight", "out_bias", "q_weight", "k_weight")
KEYS = ("qkv_weight", "qkv_bias", "q_weight", "k_weight")


def check_weights(
    name: str, w: LayerWeights, D: int, width: int, d: int, *, mlp: str, of: tuple[str, ...]
) -> None:
    """Shapes, and one dtype.

    Args:
        name:   of the argument
        w:      of the stream
        D:      width of the stream
        width:  of all heads together
        d:      of a head
        mlp:    which one
        of:     names of those that there are to be; the others must be None, and those of norms
                and biases may be
    Raises:
        ValueError: one is of another shape or dtype, is missing, or is not for this stream.
    """
    first = 0 if w.fc1_weight is None else len(w.fc1_weight)
    hidden = 0 if w.fc2_weight is None else w.fc2_weight.shape[-1]
    expected = LayerWeights(
        (3 * width, D), (3 * width,), (D, width), (D,),
        (2 * hidden if mlp == "swiglu" else hidden, D), (first,), (D, hidden), (D,), (d,), (d,),
    )  # fmt: skip
    for field, t, shape in zip(w._fields, w, expected, strict=True):
        _check_weight(f"{name}.{field}", t, shape, is_one=field in of)
        if t is not None and t.dtype != w.qkv_weight.dtype:
            raise ValueError(
                f"{name}.{field} must have the dtype of qkv_weight, {w.qkv_weight.dtype}, "
                f"got {t.dtype}"
            )


def _check_weight(name: str, t: Tensor | None, shape: tuple[int, ...], *, is_one: bool) -> None:
    if t is None:
        if is_one and name.endswith(("qkv_weight", "out_weight", "fc1_weight", "fc2_weight")):
            raise ValueError(f"{name} must be {shape}, got None")
    elif not is_one:
        raise ValueError(f"{name} must be None in this stream, got {tuple(t.shape)}")
    else:
        checks.check_shape(shape, **{name: t})
