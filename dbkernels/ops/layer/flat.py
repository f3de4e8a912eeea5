"""A layer's weights as one row of tensors, which is what autograd sees, and back.

First come the tensors of `LayerWeights` in its order, those of a `Stacked` one together, then A and
B of each adapter.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.layer import stacked
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.weights import LayerWeights


class Form(NamedTuple):
    """What is known of a layer's weights without their tensors."""

    weights: LayerWeights
    """Without its tensors."""
    layout: stacked.Layout

    def __len__(self) -> int:
        """Tensors in the row."""
        return sum(self.layout)

    def whole(self, flat: Sequence[Tensor | None], dtype: torch.dtype) -> LayerWeights:
        """The weights in a dtype, from the row."""
        return self.weights.with_tensors(stacked.whole(flat, self.layout, dtype))

    def gradients(self, needed: Sequence[bool], flat: Sequence, w: LayerWeights) -> Gradients:
        """Sums for the gradients that are needed of the row, of weights that `whole` gave."""
        wanted = zip(w.names(), stacked.wanted(needed, self.layout), strict=True)
        return Gradients(frozenset(n for n, want in wanted if want), flat[0].dtype, w.adapters)

    def apart(self, gradients: Gradients, flat: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of the row's tensors, each in its dtype; None is not wanted."""
        gradients.add_up(self.weights.ranks)
        small = flat[len(flat) - 2 * len(self.weights.adapters) :]
        results = gradients.results(self.weights.names(), [t.dtype for t in small])
        return stacked.apart(results, flat, self.layout)


def flatten(weights: LayerWeights) -> tuple[list[Tensor | None], Form]:
    """The row, and its form."""
    flat, layout = stacked.flatten(weights.tensors())
    return flat, Form(weights.without_tensors(), layout)
