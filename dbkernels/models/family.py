"""What every family of models offers to the trainer and to the samplers."""

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.ops.philox import Draw


class Family(Protocol):
    """A network that can be trained block by block; it does not know how it is trained.

    layers:        the stack that a partition cuts; a block runs some of them
    target_parts:  names of the children that make the clean target. Where every block owns a copy
                   of what is shared, these stay common and frozen: the blocks must agree on the
                   space in which the signal passes from one to the next.
    stem_and_head: names of the methods that a step runs before and after the layers, for
                   `compile_stem_and_head`: tensors in and out, no graph break, no draw, no row of a
                   table
    """

    layers: nn.ModuleList
    target_parts: ClassVar[tuple[str, ...]]
    stem_and_head: ClassVar[tuple[str, ...]]

    def target(self, batch: Batch) -> Tensor:
        """The clean target z0, (B, ...) float32."""
        ...

    def denoise(self, z: Tensor, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Run some layers on z (B, ...) at level (B,); the prediction, in the family's own form.

        All layers in order are the end-to-end network.
        """
        ...

    def losses(self, draw: Draw, level: Tensor, layers: Sequence[int], batch: Batch) -> Tensor:
        """Loss of each sample, (B,) float32, before any weight of the noise level.

        Some layers denoise the target with the noise that `draw` names, at level (B,).
        """
        ...

    def estimate(self, prediction: Tensor) -> Tensor:
        """The clean target that a prediction stands for, shape of z: what a sampler moves along."""
        ...
