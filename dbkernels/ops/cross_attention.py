"""Attention to the keys of another sequence, of each sample the first so many.

    out = softmax(q k^T / sqrt(d) + bias) v,    bias_j = 0 for j < length, else -inf

Without lengths these are the kernels of `attention`. With them a GPU has the memory-efficient
kernel and a CPU the flash kernel, both of which read the bias (B, S) as if it were (B, H, N, S):
nothing of that size exists. The backward is theirs too, since it computes the weights from q, k,
bias and logsumexp.

A sample without keys attends to nothing: its out is 0 and so are all its gradients. The kernels are
told that it has one key, and its logsumexp is then infinite, so that the backward's weights are 0.
"""

import torch
from torch import Tensor

from dbkernels.ops.attention import (
    attention_backward,
    attention_forward,
    check_head_width,
    token_major,
)
from dbkernels.ops.backend import checks

_aten = torch.ops.aten

BIAS_ALIGNMENT = 16  # elements: of a row of the bias that the memory-efficient kernel reads

# allocation and autograd


def cross_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out (B, N, H * d) and logsumexp, from q (B, H, N, d) and k, v (B, H, S, d).

    Views and logsumexp are as those of `attention_forward`.
    """
    B, H, N, d = q.shape
    if q.numel() and not k.shape[2]:
        logsumexp = q.new_full((B, H, N), torch.inf, dtype=checks.statistics_dtype(q))
        return q.new_zeros((B, N, H * d)), logsumexp
    if lengths is None or not q.numel():
        return attention_forward(q, k, v)
    bias = _bias(q, k, lengths)
    if q.device.type == "cpu":
        out, logsumexp = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, False, attn_mask=bias
        )
    else:
        out, logsumexp, *_ = _aten._scaled_dot_product_efficient_attention(
            q, k, v, bias, compute_log_sumexp=True
        )
    nothing = (lengths < 1).view(-1, 1, 1)
    out = out.transpose(1, 2).reshape(B, N, H * d).masked_fill_(nothing, 0)
    return out, logsumexp.masked_fill_(nothing, torch.inf)


def cross_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv in the shapes of q, k and v, from contiguous dout (B, N, H * d)."""
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    if lengths is None:
        return attention_backward(dout, q, k, v, out, logsumexp)
    bias, (B, H, N, d) = _bias(q, k, lengths), q.shape
    dout, out = (t.view(B, N, H, d).transpose(1, 2) for t in (dout, out))
    if q.device.type == "cpu":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, logsumexp, 0.0, False, attn_mask=bias
        )
    # not looked at without dropout
    seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in (2, ()))
    wanted = [True, True, True, False]
    return _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, bias, out, logsumexp, seed, offset, 0.0, wanted
    )[:3]


def _bias(q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
    """(B, H, N, S), of which (B, S) numbers exist; rows lie a multiple of BIAS_ALIGNMENT apart."""
    (B, H, N, _), S = q.shape, k.shape[2]
    key = torch.arange(-(-S // BIAS_ALIGNMENT) * BIAS_ALIGNMENT, device=q.device)
    bias = q.new_zeros((B, len(key)))
    bias.masked_fill_(key >= lengths.clamp(min=1)[:, None], -torch.inf)
    return bias[:, None, None, :S].expand(B, H, N, S)


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, lengths):
        out, logsumexp = cross_attention_forward(q, k, v, lengths)
        ctx.save_for_backward(q, k, v, out, logsumexp, lengths)
        return out

    @staticmethod
    def backward(ctx, dout):
        checks.refuse_double_backward("cross_attention")
        return *cross_attention_backward(dout.contiguous(), *ctx.saved_tensors), None


# public


def cross_attention(q: Tensor, k: Tensor, v: Tensor, *, lengths: Tensor | None = None) -> Tensor:
    """Let every token attend to the first keys of another sequence, head by head.

    Args:
        q:        (B, N, H, d)  float32, bfloat16 or float16, on a CPU also float64. On a GPU d as
                  that of `attention`
        k:        (B, S, H, d)  dtype of q
        v:        (B, S, H, d)  dtype of q
        lengths:  (B,)  integers: how many of its S keys each sample attends to; 0 is nothing, which
                  gives zeros. None is all. On a GPU, whose numbers are not looked at, more than S
                  counts as S and less than 0 as 0
    Returns:
        (B, N, H, d), dtype of q. Softmax and sums are at least float32 inside.
    Raises:
        ValueError: a shape, dtype or device disagrees, a length is not from 0 to S, or d does not
            suit a GPU.
        RuntimeError: the gradient is differentiated.
    """
    alike = q.dim() == k.dim() == 4 and k.shape == v.shape
    if not alike or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]):
        raise ValueError(
            f"q must be (B, N, H, d) and k and v (B, S, H, d) alike, "
            f"got {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}"
        )
    checks.check_floats(q=q, k=k, v=v)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}")
    check_head_width(q.device, q.shape[-1])
    check_lengths(lengths, k)
    by_head = (token_major(x).transpose(1, 2) for x in (q, k, v))
    return _CrossAttention.apply(*by_head, lengths).view(q.shape)


def check_lengths(lengths: Tensor | None, keys: Tensor) -> None:
    """Whether lengths are of the samples of keys (B, S, ...), on their device, and from 0 to S."""
    if lengths is None:
        return
    B, S = keys.shape[:2]
    is_integer = not lengths.is_floating_point() and lengths.dtype != torch.bool
    if lengths.shape != (B,) or not is_integer:
        raise ValueError(
            f"lengths must be (B,) = ({B},) integers, the number of keys that each sample attends "
            f"to, and no other mask is taken, got {tuple(lengths.shape)} of {lengths.dtype}"
        )
    if lengths.device != keys.device:
        raise ValueError(f"lengths must be on {keys.device}, got {lengths.device}")
    # fake tensors and those of a compiler have no numbers, and a GPU would have to be waited for
    known = lengths.device.type == "cpu" and type(lengths) is Tensor
    if known and B and not torch.compiler.is_compiling():
        low, high = (int(t) for t in lengths.aminmax())
        if low < 0 or high > S:
            raise ValueError(f"lengths must be from 0 to S = {S}, got {low} to {high}")
