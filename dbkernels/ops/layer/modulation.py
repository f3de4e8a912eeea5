"""What a layer's modulation is made of: slices of one tensor (samples, n D), in a fixed order.

A stream with a second attention has three parts more, and one that is only keys and values for the
others has no gate and no MLP.
"""

from typing import NamedTuple

from torch import Tensor


class LayerModulation(NamedTuple):
    """(samples, D) each, in the order of the published code; also of a gradient."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor

    @classmethod
    def of(cls, modulation: Tensor) -> "LayerModulation":
        """Of (..., 6 D)."""
        return cls(*modulation.chunk(6, dim=-1))

    @property
    def between(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, scale and shift from the attention branch to the MLP."""
        return self.gate1, self.scale2, self.shift2


class DualModulation(NamedTuple):
    """`LayerModulation`, and the three of a second attention: of SD3.5's layers."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor
    shift2: Tensor
    scale2: Tensor
    gate2: Tensor
    shift3: Tensor
    scale3: Tensor
    gate3: Tensor

    @classmethod
    def of(cls, modulation: Tensor) -> "DualModulation":
        """Of (..., 9 D)."""
        return cls(*modulation.chunk(9, dim=-1))

    @property
    def between(self) -> tuple[Tensor, Tensor, Tensor]:
        """Gate, scale and shift from the second attention, which is added last, to the MLP."""
        return self.gate3, self.scale2, self.shift2


class SecondModulation(NamedTuple):
    """What a second attention reads of a `DualModulation`, by the names of a first."""

    shift1: Tensor
    scale1: Tensor
    gate1: Tensor

    @classmethod
    def of(cls, modulation: Tensor) -> "SecondModulation":
        """Of (..., 9 D)."""
        return cls(*modulation.chunk(9, dim=-1)[6:])


class KeyModulation(NamedTuple):
    """Of a stream that is only keys and values: scale first, as in the code of SD3."""

    scale1: Tensor
    shift1: Tensor

    @classmethod
    def of(cls, modulation: Tensor) -> "KeyModulation":
        """Of (..., 2 D)."""
        return cls(*modulation.chunk(2, dim=-1))


Layout = type[LayerModulation] | type[DualModulation] | type[SecondModulation] | type[KeyModulation]
