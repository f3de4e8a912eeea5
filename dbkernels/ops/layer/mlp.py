"""The MLP of a layer, in chunks of tokens: its widest tensors exist a part at a time.

m = fc2(activation(fc1(y)))
"""

import torch
from torch import Tensor

from dbkernels.ops.activations import BACKWARD_OPS, activation_forward
from dbkernels.ops.backend.checks import statistics_dtype
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.linear import Linear, as_rows
from dbkernels.ops.layer.ranks import begin_sum, wait_for
from dbkernels.ops.layer.tensors import Kept, chunks

CHUNK = 8192  # tokens: enough of them to fill a GPU with one matmul
_addmm_gelu = torch.ops.aten._addmm_activation


def mlp(y: Tensor, activation: str, fc1: Linear, fc2: Linear, *, hidden: Tensor | None) -> Tensor:
    """The MLP's output, over y (B, T, D); writes hidden (B * T, F) where it is given."""
    part, sums = fc2.part(), []
    rows, without_bias = as_rows(y), fc1._replace(bias=None)
    epilogue = hidden is None and _has_epilogue(rows, activation, fc1)
    for chunk in chunks(len(rows), _chunk(rows, 2 if hidden is None and not epilogue else 1)):
        if epilogue:
            u = _addmm_gelu(fc1.bias, rows[chunk], fc1.weight.T, use_gelu=True)
        else:
            kept = None if hidden is None else hidden[chunk]
            u = activation_forward(activation, without_bias.of(rows[chunk], out=kept), fc1.bias)
        part.of(u, out=rows[chunk])
        del u  # or the next chunk's would stand beside it
        sums += begin_sum(fc2.adds, rows[chunk])
    wait_for(sums)
    fc2.add_bias(y)
    return y


def mlp_backward(
    dm: Tensor,
    y: Tensor | None,
    activation: str,
    fc1: Linear,
    fc2: Linear,
    kept: Kept,
    grads: Gradients,
) -> tuple[Tensor, Tensor | None]:
    """dy (B, T, D), from the gradient of the MLP's output, and the gradient of hidden.

    Where hidden was kept, its gradient is written over it if it is owned, and the gradient of fc1's
    weight is left to the caller, who has y later. Else hidden is computed again from y, and has
    none. dy is written over dm, a chunk at a time.
    """
    rows, hidden, without_bias = as_rows(dm), kept.pop("hidden"), fc1._replace(bias=None)
    dhidden, size = kept.buffer(hidden), _chunk(rows, 2 if hidden is None else 1)
    part, own, sums = len(rows) > size, fc1.part(), []
    grads.add_bias("fc2", dm)
    for chunk in chunks(len(rows), size):
        h = without_bias.of(as_rows(y)[chunk]) if hidden is None else hidden[chunk]
        dh = h if hidden is None else dhidden[chunk]
        u = fc2.back(rows[chunk])  # du, until the activation is written over it
        dbias = h.new_empty(h.shape[1], dtype=statistics_dtype(h))
        BACKWARD_OPS[activation](h, u, fc1.bias, dh, u, dbias)
        grads.add_weight("fc2", rows[chunk], u, part=part)
        grads.add("fc1_bias", dbias)
        own.back(dh, out=rows[chunk])
        sums += begin_sum(fc1.adds_back, rows[chunk])
        if hidden is None:
            grads.add_weight("fc1", dh, as_rows(y)[chunk], part=part)
        del h, dh, u, dbias
    wait_for(sums)
    return dm, dhidden


def _has_epilogue(rows: Tensor, activation: str, fc1: Linear) -> bool:
    """Whether fc1 can give its activation alone, for those who do not keep its pre-activation.

    cuBLASLt adds the bias and takes GELU in its tanh form before it rounds and writes: one launch
    less, and 4 F bytes less to move for a token. Only for bfloat16: the tanh may be the hardware's,
    of 11 bits. A CPU's op of that name has GELU's other form. What adapters add comes before GELU.
    """
    fits = activation == "gelu" and fc1.bias is not None and rows.dtype == torch.bfloat16
    return fits and not fc1.adapters and runs_as_on_gpu(rows)


def _chunk(rows: Tensor, temporaries: int) -> int:
    """Tokens of a chunk, of those in rows, each of which has so many temporaries of hidden's width.

    On a GPU those of a chunk together are as large as hidden would be of half of the tokens, which
    the attention's backward needs too, or of 2 CHUNK: few launches are worth more than that saves.
    """
    if not runs_as_on_gpu(rows):
        return CHUNK
    return max(2 * CHUNK, -(-len(rows) // 2)) // temporaries
