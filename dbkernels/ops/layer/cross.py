"""An AdaLN layer with attention to another sequence between its two branches.

    x1  = x  + gate1 * attention((1 + scale1) * norm(x) + shift1)
    x2  = x1 + W_o crossattention(W_q x1, W_kv context) + b
    out = x2 + gate2 * mlp((1 + scale2) * norm(x2) + shift2)

Chen et al. 2023 (arXiv:2310.00426), section 2.3, PixArt-alpha: the cross-attention has neither norm
nor gate. Keys are the first tokens of the context, as many as a sample's length says.

What each policy keeps, in units of D elements per token, for a hidden layer of 4 D and heads as
wide together as D (SwiGLU's hidden layer is 8 D), and for each token of the context:

                  x  q, k, v  attended  a   cross: q  attended  c   hidden  m   together   k, v
    none          1     3        1      1          1      1     1     4     1      14        2
    attention     1     3               1          1            1     4     1      12        2
    mlp           1     3        1      1          1      1     1           1      10        2
    qkv           1              1      1                 1     1           1       6        0
    layer         1                                                                 1        0
    layer_narrow  1, in the dtype of the branches                                   1        0

The context itself is the caller's, and all layers of a stack share it. logsumexp, twice, and the
statistics of two norms add 2 H + 4 float32 numbers per token where they are kept. x1 and x2 are
made again, a pass over a row each. `layer_narrow` also keeps 4 bytes for each token, the mean of x,
which W_q reads.
"""

from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype
from dbkernels.ops.layer.condition import Condition
from dbkernels.ops.layer.cross_passes import CROSS
from dbkernels.ops.layer.function import apply_layer, check_call, modulation_at
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.tensors import Context, LayerCall, LayerOptions
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.settings import check_choice

CHUNKS = 6  # of the modulation


def cross_layer(
    x: Tensor,
    modulation: Tensor | Condition,
    context: Tensor,
    weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    lengths: Tensor | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    recompute: Recompute = "none",
) -> Tensor:
    """Run one layer with cross-attention, keeping for its backward what the policy says.

    The branches run in the dtype of the weights, or in autocast's; the residual stream keeps that
    of x. The backward writes over what it kept, unless it is told to retain the graph.

    Args:
        x:           (B, T, D)  residual stream: float32, bfloat16 or float16
        modulation:  (B, 6 D) per sample or (B, T, 6 D) per token: shift, scale and gate of the
                     attention, then of the MLP; or the condition of each token that it is made of,
                     which policies that keep little keep in its place
        context:     (B, S, C)  the other sequence, of any of these dtypes
        weights:     of one dtype, as `LayerWeights` tells their shapes, with those of
                     cross-attention
        num_heads:   H, of both attentions
        head_dim:    d; None is D / H, and then H divides D
        lengths:     (B,)  integers: how many tokens of its context each sample attends to; 0 is
                     nothing, and c is then b. None is all. No other mask is taken
        rotary:      (2, T, d) cosines and sines, float32, of the attention among x alone; None does
                     not rotate
        mlp:         "gelu" (tanh), "gelu_exact" or "swiglu"
        norm:        "layer", or "rms", which does not subtract the mean
        eps:         of the norms, in units of x**2
        qk_eps:      of the norms of queries and keys among x, in units of their squares
        recompute:   a name of `POLICIES`
    Returns:
        (B, T, D), dtype of x.
    Raises:
        ValueError: a shape, dtype or device disagrees, a name is unknown, or a length is not from 0
            to S.
        RuntimeError: the gradient is differentiated.
    """
    check_choice("mlp", mlp, ACTIVATIONS)
    modulation = modulation_at(recompute, modulation)
    checks.check_tokens(x=x)
    told = NormOptions(eps, checks.check_norm(norm), compute_dtype(x, weights.qkv_weight))
    options = LayerOptions(num_heads, mlp, told, told, qk_eps, recompute)
    other = Context(context.contiguous(), lengths)
    call = LayerCall(x, modulation, rotary, weights, options, context=other)
    check_call(call, head_dim, chunks=CHUNKS)
    return apply_layer(CROSS, call)
