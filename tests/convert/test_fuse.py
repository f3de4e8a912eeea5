"""`fuse` and `unfuse`: what they replace, what they leave, and what they refuse."""

import pytest
import torch
from convert import published
from convert.fused_cases import Network, dit_block
from convert.variations import VARIATIONS
from torch import nn

from dbkernels.convert import fuse, unfuse
from dbkernels.convert.fused.layer import FusedLayer


def network(count=2):
    torch.manual_seed(3)
    return Network(*(dit_block().module for _ in range(count)))


def varied(name):
    block = published.Block()
    VARIATIONS[name][0](block)
    return block


def test_what_is_replaced_and_what_is_left_is_told_by_path():
    model = network()
    model.blocks.append(varied("relu"))
    model.blocks.append(nn.TransformerEncoderLayer(12, 2))
    report = fuse(model)
    assert [tuple(each) for each in report.replaced] == [
        ("blocks.0", "Block"),
        ("blocks.1", "Block"),
    ]
    left = {path: (kind, why) for path, kind, why in report.left}
    assert left.keys() == {"embed", "head", "blocks.2", "blocks.3"}
    assert left["blocks.2"][0] == "Block"
    assert "mlp.act must be a plain GELU" in left["blocks.2"][1]
    assert left["blocks.3"] == ("TransformerEncoderLayer", "no layer of a class that is known")
    assert "blocks.2  Block: mlp.act must be" in str(report)


@pytest.mark.parametrize(
    "name", [name for name, (_, named) in VARIATIONS.items() if named is not None]
)
def test_a_block_that_no_layer_computes_is_left(name):
    block = varied(name)
    model = Network(block)
    report = fuse(model)
    assert not report.replaced
    assert model.blocks[0] is block


def test_fuse_then_unfuse_is_the_identity():
    model, (_, given) = network(), dit_block()
    before, names = dict(model.named_modules()), [str(m) for m in model.modules()]
    expected = model(*given)
    fuse(model)
    assert all(isinstance(block, FusedLayer) for block in model.blocks)
    torch.testing.assert_close(model(*given), expected, rtol=1e-5, atol=1e-5)
    assert [each.path for each in unfuse(model)] == ["blocks.0", "blocks.1"]
    after = dict(model.named_modules())
    assert after.keys() == before.keys()
    assert all(after[name] is module for name, module in before.items())
    assert [str(m) for m in model.modules()] == names
    assert torch.equal(model(*given), expected)
    assert unfuse(model) == ()
