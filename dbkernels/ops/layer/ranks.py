"""Processes that share one layer: each has some of its heads and of the MLP's hidden columns.

Shoeybi et al. 2019 (arXiv:1909.08053), section 3. qkv and fc1 are cut by their outputs, out and fc2
by their inputs. What those two give is a sum over the ranks, before its bias; so is what comes back
through the other two. All of width D is the same on every rank, bit for bit: the stream x, the
branches' outputs a and m, the modulation, and their gradients.

Sums over the ranks, of (tokens, D) in the dtype of the branches, for each part of the samples that
run together and for each chunk of tokens of the MLP:

    recompute                       forward     backward
    none, attention, mlp, qkv       a, m        dy2, dy1
    layer, layer_narrow             a, m        a, m, dy2, dy1

A parallel layer has one for a and m together, and one for dy. Cross-attention has one more, for c,
and in the backward for the gradient of its queries' input and of the context where that is wanted.
A layer of two streams has those of each stream, and a second attention a sum for a2 and one for its
dy. Beside them the backward has one of 2 d numbers, for the weights of the norms of queries and
keys, which all heads share; and a condition's projection that is cut too has a gathering of
(samples, 6 D) where the modulation is made, and a sum of (samples, cond_dim) in the backward. Where
each token has a condition, the gathering moves as many bytes as three sums.

The sum of one chunk of the MLP runs beside the matmuls of the next, and beside the gradient of
fc1's weight where hidden is made again. Others wait: what follows them reads what they give.

Of the units that `recompute` counts, x, a and m are whole on each rank, and q, k, v, what was
attended to and hidden are cut: of n ranks a layer at "none" keeps 3 + 8 / n.
"""

from collections.abc import Iterable

import torch.distributed as dist
from torch import Tensor


class Ranks:
    """The processes of one group, in the order of their ranks.

    A copy of what holds one, as of a layer, has the same: a process group has no copies.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group

    @property
    def size(self) -> int:
        """How many."""
        return self.group.size()

    @property
    def rank(self) -> int:
        """Of this process."""
        return self.group.rank()

    def __deepcopy__(self, memo: dict) -> "Ranks":
        return self

    def sum(self, t: Tensor) -> None:
        """t, contiguous, becomes the sum of those of all ranks."""
        dist.all_reduce(t, group=self.group)

    def begin_sum(self, t: Tensor) -> dist.Work:
        """`sum`, beside what follows; t is not to be touched until the work was waited for."""
        return dist.all_reduce(t, group=self.group, async_op=True)

    def gather(self, t: Tensor) -> Tensor:
        """(..., D / n) of each rank, contiguous, one after another: (..., D)."""
        whole = t.new_empty((self.size, *t.shape))
        dist.all_gather(list(whole.unbind()), t, group=self.group)
        return whole.movedim(0, -2).flatten(-2)

    def own(self, t: Tensor) -> Tensor:
        """Of (..., D) this rank's (..., D / n): a view."""
        return t.unflatten(-1, (self.size, -1)).select(-2, self.rank)


def sum_or_not(ranks: Ranks | None, t: Tensor) -> None:
    """`Ranks.sum`, or nothing where a layer is whole."""
    if ranks is not None:
        ranks.sum(t)


def begin_sum(ranks: Ranks | None, t: Tensor) -> list[dist.Work]:
    """`Ranks.begin_sum`; nothing to wait for where a layer is whole."""
    return [] if ranks is None else [ranks.begin_sum(t)]


def wait_for(sums: Iterable[dist.Work]) -> None:
    """Until all of them are there, for what follows on the device."""
    for work in sums:
        work.wait()
