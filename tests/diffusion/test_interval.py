import pytest

from dbkernels.diffusion.interval import Interval


@pytest.mark.parametrize("ends", [(1.0, 1.0), (2.0, 1.0), (float("nan"), 1.0)])
def test_rejects_ends_out_of_order(ends):
    with pytest.raises(ValueError, match="needs low < high, got low"):
        Interval(*ends)
