"""What `adaln_layer` refuses, with the name, the expected and the got."""

from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.attention import check_head_width
from dbkernels.ops.backend import checks
from dbkernels.ops.layer.first_tokens import check_first
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import LayerOptions, LayerWeights
from dbkernels.ops.qk_norm_rotary import check_rotary


def check_options(mlp: str, recompute: str) -> None:
    """Names that are looked up."""
    if mlp not in ACTIVATIONS:
        raise ValueError(f"mlp must be one of {', '.join(ACTIVATIONS)}, got {mlp}")
    if recompute not in POLICIES:
        raise ValueError(f"recompute must be one of {', '.join(POLICIES)}, got {recompute}")


def check_layer(
    x: Tensor,
    modulation: Tensor,
    rotary: Tensor | None,
    weights: LayerWeights,
    options: LayerOptions,
) -> None:
    """Shapes, dtypes and devices of one call."""
    checks.check_floats(x=x, modulation=modulation, rotary=rotary, **weights._asdict())
    checks.check_tokens(x=x)
    B, T, D = x.shape
    if tuple(modulation.shape) not in ((B, 6 * D), (B, T, 6 * D)):
        raise ValueError(
            f"modulation must be (B, 6 D) = ({B}, {6 * D}) or (B, T, 6 D) = ({B}, {T}, {6 * D}), "
            f"got {tuple(modulation.shape)}"
        )
    if options.num_heads < 1 or D % options.num_heads:
        raise ValueError(f"num_heads must divide D = {D}, got {options.num_heads}")
    check_head_width(x.device, D // options.num_heads)
    check_first(options.num_queries, T)
    if rotary is not None:
        check_rotary(rotary, T, D // options.num_heads)
    _check_weights(D, weights, options)


def _check_weights(D: int, w: LayerWeights, options: LayerOptions) -> None:
    if (w.q_weight is None) != (w.k_weight is None):
        raise ValueError("q_weight and k_weight must be given together, got one of them")
    first, hidden, d = len(w.fc1_weight), w.fc2_weight.shape[-1], D // options.num_heads
    expected = LayerWeights(
        (3 * D, D), (3 * D,), (D, D), (D,),
        (2 * hidden if options.mlp == "swiglu" else hidden, D), (first,), (D, hidden), (D,),
        (d,), (d,),
    )  # fmt: skip
    for name, shape in expected._asdict().items():
        weight = getattr(w, name)
        if weight is not None and tuple(weight.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(weight.shape)}")
        if weight is not None and weight.dtype != w.qkv_weight.dtype:
            raise ValueError(
                f"{name} must have the dtype of qkv_weight, {w.qkv_weight.dtype}, "
                f"got {weight.dtype}"
            )
