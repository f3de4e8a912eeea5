"""The first tokens of a sequence, for those who read no others."""

from torch import Tensor


def first_tokens(x: Tensor, tokens: int | None) -> Tensor:
    """The first tokens of each sample, without the memory of the others.

    Args:
        x:       (B, T, D)
        tokens:  1 to T; None is T
    Returns:
        (B, tokens, D), contiguous; x itself where that is all of it.
    Raises:
        ValueError: tokens is not from 1 to T.
    """
    check_first(tokens, x.shape[1])
    if tokens is None or tokens == x.shape[1]:
        return x
    # a copy: whoever keeps a slice keeps all that it is a slice of
    return x[:, :tokens].contiguous()


def check_first(tokens: int | None, T: int) -> None:
    """Whether a sequence of T tokens has so many."""
    if tokens is None:
        return
    if not isinstance(tokens, int) or not 1 <= tokens <= T:
        raise ValueError(f"tokens must be an integer from 1 to T = {T}, or None, got {tokens}")
