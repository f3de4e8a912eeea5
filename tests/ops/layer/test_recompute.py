from itertools import pairwise
from typing import get_args

import pytest
import torch
from ops.one_layer import EVERY_POLICY, OneLayer, saved_by

from dbkernels.ops import POLICIES, adaln_layer, reference
from dbkernels.ops.layer.recompute import Recompute, policies_of
from dbkernels.ops.layer.tensors import Activations

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
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_keeps_as_much_as_it_says(recompute, dtype):
    # mean and rstd of two norms, and a logsumexp per head, in float32
    small = 4 * bool(POLICIES[recompute].keeps) + H * ("logsumexp" in POLICIES[recompute].keeps)
    expected = POLICIES[recompute].units + small * 4 / (D * dtype.itemsize)
    assert units_kept(adaln_layer, dtype, recompute=recompute) == pytest.approx(expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_eager_keeps_twenty(dtype):
    assert 20 <= units_kept(reference.adaln_layer, dtype) < 20.2


def test_each_policy_keeps_less_than_the_one_before():
    policies = list(POLICIES.values())
    assert [policy.units for policy in policies] == [11, 10, 7, 4, 1, 1]
    assert policies[0].keeps == set(Activations._fields) and not policies[-1].keeps
    assert [policy.narrow for policy in policies] == [False] * 5 + [True]
    for more, less in pairwise(policies[:-1]):
        assert less.recomputes != more.recomputes
        # the attention is kept again once the MLP is not
        assert less.keeps - {"attended", "logsumexp"} < more.keeps | {"attended", "logsumexp"}
    # queries of a tensor of their own go where keys and values go
    assert all(("q" in policy.keeps) == ("qkv" in policy.keeps) for policy in policies)


def test_the_last_policy_halves_what_is_kept_of_a_stream_wider_than_the_branches():
    layer = OneLayer(B, T, D, H, dtypes=(torch.float32, torch.bfloat16, torch.bfloat16))
    leaves, kept = layer.leaves(), {}
    others = {t.untyped_storage().data_ptr() for name, t in leaves.items() if name != "x"}
    for recompute in ("layer", "layer_narrow"):
        _, saved = saved_by(lambda recompute=recompute: layer.run(leaves, recompute=recompute))
        own = [t for address, t in saved.items() if address not in others]
        kept[recompute] = sum(t.untyped_storage().nbytes() for t in own)
    assert kept["layer"] == 4 * B * T * D and kept["layer_narrow"] == 2 * B * T * D


def test_where_nothing_is_rounded_the_last_policy_is_the_one_before():
    assert policies_of(mixed=True) == tuple(EVERY_POLICY)
    assert policies_of(mixed=False) == tuple(EVERY_POLICY[:-1])


def test_a_config_can_name_every_policy():
    assert list(POLICIES) == list(get_args(Recompute))
