"""An interval of noise levels, the common word of both noise processes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """Noise levels from `low` to `high`.

    low:   exclusive, except where it is the least level of all
    high:  inclusive; sigma in units of z, or mask time in [0, 1]
    """

    low: float
    high: float

    def __post_init__(self):
        if not self.low < self.high:
            raise ValueError(
                f"an interval needs low < high, got low {self.low} and high {self.high}"
            )
