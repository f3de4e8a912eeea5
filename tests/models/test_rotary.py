import pytest
import torch

from dbkernels.models.rotary import rotary_table


def test_the_table_holds_cosines_then_sines_each_half_repeated():
    table = rotary_table(torch.tensor([0, 3]), 4, base=100.0)
    angles = torch.tensor([[0, 0, 0, 0], [3, 0.3, 3, 0.3]])
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, torch.stack([angles.cos(), angles.sin()]))


def test_an_odd_head_width_is_refused():
    with pytest.raises(ValueError, match="rotary positions need an even head width, got 5"):
        rotary_table(torch.arange(3), 5)
