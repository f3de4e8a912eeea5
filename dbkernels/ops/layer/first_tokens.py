"""The first tokens of a sequence, for those who read no others."""

from torch import Tensor


def first_tokens(x: Tensor, num_queries: int | None) -> Tensor:
    """The first tokens of each sample, without the memory of the others.

    Args:
        x:            (B, T, D)
        num_queries:  1 to T; None is T
    Returns:
        (B, num_queries, D), contiguous; x itself where that is all of it.
    Raises:
        ValueError: num_queries is not from 1 to T.
    """
    check_first(num_queries, x.shape[1])
    if num_queries is None or num_queries == x.shape[1]:
        return x
    # a copy: whoever keeps a slice keeps all that it is a slice of
    return x[:, :num_queries].contiguous()


def check_first(num_queries: int | None, T: int) -> None:
    """Whether a sequence of T tokens has so many."""
    if num_queries is None:
        return
    if not isinstance(num_queries, int) or not 1 <= num_queries <= T:
        raise ValueError(
            f"num_queries must be an integer from 1 to T = {T}, or None, got {num_queries}"
        )
