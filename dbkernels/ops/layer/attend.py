"""The attention of a layer: which keys its tokens see, and what it refuses."""

from typing import get_args

from torch import Tensor

from dbkernels.ops.attention import (
    attention_backward,
    attention_forward,
    dropped_attention_backward,
    dropped_attention_forward,
)
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.tensors import AttentionKind, LayerOptions
from dbkernels.ops.two_stream import check_streams, two_stream_backward, two_stream_forward
from dbkernels.settings import check_choice


def attend_forward(options: LayerOptions, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """out (n, N, H d) and logsumexp, from q (n, H, N, d) and k, v (B, H, T, d)."""
    dropout = options.dropout
    if options.attention == "two_stream":
        return two_stream_forward(q, k, v)
    if dropout is not None and dropout.attention:
        return dropped_attention_forward(q, k, v, dropout)
    return attention_forward(q, k, v, options.attention == "causal")


def attend_gradients(options: LayerOptions, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv, from dout, q, k, v, out and logsumexp."""
    dropout = options.dropout
    if options.attention == "two_stream":
        return two_stream_backward(*tensors)
    if dropout is not None and dropout.attention:
        return dropped_attention_backward(*tensors, dropout)
    return attention_backward(*tensors, options.attention == "causal")


def check_attention(attention: AttentionKind, attention_dropout: float, samples: int) -> None:
    """Whether there is such an attention, of so many samples and with this dropout."""
    check_choice("attention", attention, get_args(AttentionKind))
    if attention_dropout and attention != "full":
        raise ValueError(
            f"attention_dropout must be 0 with attention {attention}, got {attention_dropout}"
        )
    if attention == "two_stream":
        check_streams(samples)


def wanted_of(
    x: Tensor, attention: AttentionKind, num_queries: int | None, num_samples: int | None
) -> Wanted:
    """What a caller asks for of x (B, T, D); None where that is all.

    Raises:
        ValueError: num_queries is not from 1 to T or the attention is not full, or num_samples is
            not that of one stream or there are not two.
    """
    samples, T = x.shape[:2]
    _check_queries(num_queries, T, attention)
    _check_samples(num_samples, samples, attention)
    # a compiler takes a size for a constant that is compared with None
    every_sample = num_samples is None or num_samples == samples
    every_token = num_queries is None or num_queries == T
    return Wanted(None if every_sample else num_samples, None if every_token else num_queries)


def _check_queries(num_queries: int | None, T: int, attention: AttentionKind) -> None:
    if num_queries is None:
        return
    if not (isinstance(num_queries, int) and 1 <= num_queries <= T):
        raise ValueError(
            f"num_queries must be an integer from 1 to T = {T}, or None, got {num_queries}"
        )
    # the first tokens of a causal layer see no others: who wants them alone gives them alone
    if attention != "full":
        raise ValueError(f"num_queries must be None with attention {attention}, got {num_queries}")


def _check_samples(num_samples: int | None, samples: int, attention: AttentionKind) -> None:
    if num_samples is None:
        return
    # without a second stream no sample is read by another
    if attention != "two_stream":
        raise ValueError(f"num_samples must be None with attention {attention}, got {num_samples}")
    if num_samples not in (samples // 2, samples):
        raise ValueError(
            f"num_samples must be B = {samples // 2}, those of the noisy stream, "
            f"or None, got {num_samples}"
        )
