"""Which elements of queries and keys a rotary position turns together, and rows to match.

    neighbours    (0, 1), (2, 3), ...                    most published image models
    halves        (0, d / 2), (1, d / 2 + 1), ...        the kernels here

Turned by halves, the same rows in another order give the same products of queries with keys. So
for an op the rows of both projections are permuted, their biases, the weights of both norms and the
table of cosines and sines; values are as they are.
"""

import torch
from torch import Tensor


def halves_of_neighbours(d: int, heads: int = 1) -> Tensor:
    """Order by which rows[order] are paired by halves, of rows that are paired by neighbours.

    Args:
        d:      width of a head, even
        heads:  number of heads, each with d rows of its own
    Returns:
        (heads * d,) int64 on the CPU.
    Raises:
        ValueError: d is odd.
    """
    if d < 2 or d % 2:
        raise ValueError(f"d must be even to be paired, got {d}")
    rows = torch.arange(heads * d, device="cpu")
    return rows.view(heads, d // 2, 2).transpose(1, 2).flatten()


def neighbours_of_halves(d: int, heads: int = 1) -> Tensor:
    """The order back: (heads * d,) int64; rows[order] are paired by neighbours.

    Raises:
        ValueError: d is odd.
    """
    return halves_of_neighbours(d, heads).argsort()


def qkv_by_halves(d: int, heads: int) -> Tensor:
    """`halves_of_neighbours` for a projection to queries, keys and values, (3 * heads * d,).

    Raises:
        ValueError: d is odd.
    """
    width, order = heads * d, halves_of_neighbours(d, heads)
    return torch.cat([order, order + width, torch.arange(2 * width, 3 * width, device="cpu")])


def table_by_halves(cos: Tensor, sin: Tensor) -> Tensor:
    """The table of an op from one that is paired by neighbours.

    Args:
        cos, sin:  (T, d) each, any float dtype; the elements of a pair are equal
    Returns:
        (2, T, d) float32: cosines, then sines.
    Raises:
        ValueError: a shape is another one, or the elements of a pair differ.
    """
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] % 2:
        raise ValueError(
            f"cos and sin must be (T, d) with an even d, got {tuple(cos.shape)} and "
            f"{tuple(sin.shape)}"
        )
    table = torch.stack([cos, sin])
    first, second = table[..., ::2], table[..., 1::2]
    if not torch.equal(first, second):
        raise ValueError("cos and sin must have one angle for each pair of neighbours, got two")
    return torch.cat([first, second], dim=-1).float()
