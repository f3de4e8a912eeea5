from itertools import pairwise
from typing import get_args

import pytest
import torch
from ops.one_layer import KEEPS, OneLayer, saved_by

from dbkernels.ops import RUNGS, adaln_layer, reference
from dbkernels.ops._layer_tensors import Activations
from dbkernels.ops.rung import Keep, rungs_of

B, T, D, H = 2, 64, 192, 3
DTYPES = [torch.float32, torch.bfloat16]


def units_kept(op, dtype, **options):
    """What autograd keeps beside the weights and the modulation, D elements per token as 1."""
    layer = OneLayer(B, T, D, H, hidden=4 * D, qk_norm=False, dtypes=(dtype,) * 3)
    leaves = layer.leaves()
    _, kept = saved_by(lambda: layer.run(leaves, op, **options))
    for name, leaf in leaves.items():
        if name != "x":
            kept.pop(leaf.untyped_storage().data_ptr(), None)
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / (B * T * D * dtype.itemsize)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keep", KEEPS)
def test_keeps_as_much_as_it_says(keep, dtype):
    # mean and rstd of two norms, and a logsumexp per head, in float32
    small = 4 * bool(RUNGS[keep].keeps) + H * ("logsumexp" in RUNGS[keep].keeps)
    expected = RUNGS[keep].units + small * 4 / (D * dtype.itemsize)
    assert units_kept(adaln_layer, dtype, keep=keep) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_keeps_twenty(dtype):
    assert 20 <= units_kept(reference.adaln_layer, dtype) < 20.2


def test_each_rung_keeps_less_than_the_one_before():
    rungs = list(RUNGS.values())
    assert [rung.units for rung in rungs] == [11, 10, 7, 4, 1, 1]
    assert rungs[0].keeps == set(Activations._fields) and not rungs[-1].keeps
    assert [rung.rounds for rung in rungs] == [False] * 5 + [True]
    for more, less in pairwise(rungs[:-1]):
        assert less.recomputes != more.recomputes
        # the attention is kept again once the MLP is not
        assert less.keeps - {"attended", "logsumexp"} < more.keeps | {"attended", "logsumexp"}
    # queries of a tensor of their own go where keys and values go
    assert all(("q" in rung.keeps) == ("qkv" in rung.keeps) for rung in rungs)


def test_the_last_rung_halves_what_is_kept_of_a_stream_wider_than_the_branches():
    layer = OneLayer(B, T, D, H, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    leaves, kept = layer.leaves(), {}
    others = {t.untyped_storage().data_ptr() for name, t in leaves.items() if name != "x"}
    for keep in ("layer", "rounded"):
        _, saved = saved_by(lambda keep=keep: layer.run(leaves, keep=keep))
        own = [t for address, t in saved.items() if address not in others]
        kept[keep] = sum(t.untyped_storage().nbytes() for t in own)
    assert kept["layer"] == 4 * B * T * D and kept["rounded"] == 2 * B * T * D


def test_where_nothing_is_rounded_the_last_rung_is_the_one_before():
    assert rungs_of(mixed=True) == tuple(KEEPS)
    assert rungs_of(mixed=False) == tuple(KEEPS[:-1])


def test_a_config_can_name_every_rung():
    assert list(RUNGS) == list(get_args(Keep))
