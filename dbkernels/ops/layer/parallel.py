"""A parallel layer: attention and MLP read one norm and share one projection out.

    y   = (1 + scale) * norm(x) + shift
    a   = W_out [attention(q, k, v), activation(h)] + b,    q, k, v, h projections of y
    out = x + gate * a

Dehghani et al. 2023 (arXiv:2302.05442), section 2, conditioned as the single-stream layers of Flux
(github.com/black-forest-labs/flux). The two halves of W_out are the weights `out` and `fc2`: their
products go into one tensor, so the concatenation is never made.

What each policy keeps, in units of D elements per token, for a hidden layer of 4 D and heads as
wide together as D (SwiGLU's hidden layer is 8 D):

                  x   q, k, v   attended   hidden   a   together
    none          1      3         1         4      1      10
    attention     1      3                   4      1       9
    mlp           1      3         1                1       6
    qkv           1                1                1       3
    layer         1                                         1
    layer_narrow  1, in the dtype of the branches           1

An AdaLN layer keeps one more wherever it keeps a: it has a branch's output twice. logsumexp and the
statistics of the norm add H + 2 float32 numbers per token where they are kept. The activation and
the norm's result are made again, a pass over a row each.
"""

from torch import Tensor

from dbkernels.ops.activations import ACTIVATIONS
from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.backend import checks
from dbkernels.ops.backend.register import compute_dtype
from dbkernels.ops.layer.condition import Condition
from dbkernels.ops.layer.function import apply_layer, check_call, modulation_at
from dbkernels.ops.layer.parallel_passes import PARALLEL
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.tensors import LayerCall, LayerOptions
from dbkernels.ops.layer.weights import LayerWeights
from dbkernels.settings import check_choice

CHUNKS = 3  # of the modulation


def parallel_layer(
    x: Tensor,
    modulation: Tensor | Condition,
    weights: LayerWeights,
    *,
    num_heads: int,
    head_dim: int | None = None,
    rotary: Tensor | None = None,
    mlp: str = "gelu",
    norm: checks.Norm = "layer",
    eps: float = 1e-6,
    qk_eps: float = 1e-6,
    recompute: Recompute = "none",
) -> Tensor:
    """Run one parallel layer, keeping for its backward what the policy says.

    The branches run in the dtype of the weights, or in autocast's; the residual stream keeps that
    of x. The backward writes over what it kept, unless it is told to retain the graph.

    Args:
        x:           (B, T, D)  residual stream: float32, bfloat16 or float16
        modulation:  (B, 3 D) per sample or (B, T, 3 D) per token: shift, scale and gate; or the
                     condition of each token that it is made of, which policies that keep little
                     keep in its place
        weights:     of one dtype, as `LayerWeights` tells their shapes. out_weight and fc2_weight
                     are the columns of W_out that read the attention and the activation, and b is
                     the sum of out_bias and fc2_bias: one of them may be None, or both
        num_heads:   H
        head_dim:    d; None is D / H, and then H divides D
        rotary:      (2, T, d) cosines and sines, float32; None does not rotate
        mlp:         "gelu" (tanh), "gelu_exact" or "swiglu"
        norm:        "layer", or "rms", which does not subtract the mean
        eps:         of the norm, in units of x**2
        qk_eps:      of the norms of queries and keys, in units of their squares
        recompute:   a name of `POLICIES`
    Returns:
        (B, T, D), dtype of x.
    Raises:
        ValueError: a shape, dtype or device disagrees, or a name is unknown.
        RuntimeError: the gradient is differentiated.
    """
    check_choice("mlp", mlp, ACTIVATIONS)
    modulation = modulation_at(recompute, modulation)
    checks.check_tokens(x=x)
    told = NormOptions(eps, checks.check_norm(norm), compute_dtype(x, weights.qkv_weight))
    options = LayerOptions(num_heads, mlp, told, told, qk_eps, recompute)
    call = LayerCall(x, modulation, rotary, weights, options)
    check_call(call, head_dim, chunks=CHUNKS)
    return apply_layer(PARALLEL, call)
