"""What is left out, by whose numbers, and that the backward leaves out the same."""

import math
import sys
from functools import partial

import pytest
import torch
from accuracy import with_grads
from implementations import each_implementation
from ops.one_layer import (
    EVERY_POLICY,
    SAME_BITS,
    OneLayer,
    assert_close,
    assert_same_bits,
    saved_bytes,
)
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls

from dbkernels.ops import Draw, dropout, normals, reference, use_implementation
from dbkernels.ops.dropout import PLACES, drop
from dbkernels.ops.layer import passes

DRAW = Draw(2**64 - 5, 2**40 + 3, 7)
TOLD = {"dropout": 0.3, "attention_dropout": 0.2, "draw": DRAW}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


implementation = each_implementation("dropout_fwd")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 7), (2, 1030), (4,), (0, 3), (2, 0)])
def test_leaves_out_what_the_specification_does(shape, dtype, implementation):
    x = torch.randn(shape).to(dtype)
    for p, place in ((0.3, 0), (0.9, 5), (0.0, PLACES - 1)):
        actual = with_grads(partial(dropout, p=p, draw=DRAW, place=place), x)
        exact = with_grads(partial(reference.dropout, p=p, draw=DRAW, place=place), x.double())
        for value, expected in zip(actual, exact, strict=True):
            assert value.dtype == dtype and torch.equal(value == 0, expected.to(dtype) == 0)
            rtol = 2 * torch.finfo(dtype).eps  # of a product that is rounded twice
            torch.testing.assert_close(value, expected.to(dtype), rtol=rtol, atol=0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.99])
def test_the_rate_is_p_and_the_mean_stays(p):
    count = 2**20
    y = dropout(torch.ones(4, count // 4), p, DRAW)
    # of so many coins; five deviations
    assert (y == 0).double().mean() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / count))
    assert y.mean() == pytest.approx(1, abs=5 * math.sqrt(p / (1 - p) / count))


def test_masks_are_independent_of_each_other_and_of_the_noise():
    def mask(draw=DRAW, place=0, half=0.5):
        return (dropout(torch.ones(2, 2**15), half, draw, place=place) == 0).flatten().double()

    others = [
        mask(place=1),
        mask(Draw(DRAW.seed, DRAW.step + 1, DRAW.sample)),
        mask(DRAW.nth(0)),
        mask(DRAW.nth(1)),
        (normals(DRAW, 2, 2**15) > 0).flatten().double(),
    ]
    both = torch.corrcoef(torch.stack([mask(), *others])) - torch.eye(6, dtype=torch.float64)
    assert both.abs().max() < 5 / 256  # deviations of a correlation of 2**16 pairs


def test_a_sample_has_its_own_numbers_however_many_there_are_and_its_first_tokens_the_same():
    x = torch.randn(5, 6, 9)
    whole = dropout(x, 0.4, DRAW)
    later = Draw(DRAW.seed, DRAW.step, DRAW.sample + 2)
    assert torch.equal(dropout(x[2:], 0.4, later), whole[2:])
    assert torch.equal(dropout(x[:, :2], 0.4, DRAW), whole[:, :2])


def test_keeps_nothing_for_its_backward_and_takes_any_strides(implementation):
    x = torch.randn(2, 9, 4, requires_grad=True)
    assert saved_bytes(lambda: dropout(x, 0.5, DRAW)) == 0
    y, dx = with_grads(partial(dropout, p=0.5, draw=DRAW), x.detach().mT)
    assert torch.equal(y, dropout(x.detach().mT.contiguous(), 0.5, DRAW))
    assert torch.equal(y == 0, dx == 0)


def test_what_is_left_out_is_0_even_where_it_was_no_number(implementation):
    x = torch.full((2, 64), torch.nan)
    assert torch.equal(dropout(x, 0.5, DRAW) == 0, dropout(torch.ones(2, 64), 0.5, DRAW) == 0)


def test_a_layer_asks_for_well_formed_ops_and_writes_over_x(implementation):
    x = torch.randn(3, 33)
    expected = dropout(x, 0.5, DRAW)
    for check in (opcheck_calls, assert_calls_stay_within_their_tensors):
        check(lambda: dropout(torch.randn(3, 33), 0.5, DRAW))
    assert drop(x, 0.5, DRAW, 0, out=x) is x and torch.equal(x, expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dropout(x, 1.0, DRAW), r"p must be in \[0, 1\), got 1.0"),
        (lambda x: dropout(x, math.nan, DRAW), r"p must be in \[0, 1\), got nan"),
        (lambda x: dropout(x, 0.5, DRAW, place=PLACES), "place must be at most 253, got 254"),
        (lambda x: dropout(x, 0.5, DRAW, place=-1), "place must be at least 0, got -1"),
        (lambda x: dropout(x.int(), 0.5, DRAW), "x must be one of .*, got torch.int32"),
        (lambda x: dropout(x[0, 0], 0.5, DRAW), r"x must be \(B, ...\), got a scalar"),
        (lambda x: layer_with(dropout=1.5), r"dropout must be in \[0, 1\), got 1.5"),
        (lambda x: layer_with(attention_dropout=-0.5), r"attention_dropout must be in \[0, 1\)"),
        (lambda x: layer_with(draw=None), "draw must be given with dropout 0.3 and 0.2, got None"),
    ],
)
def test_rejects(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(2, 3))


# of a layer


def layer_with(**options):
    layer = OneLayer()
    return layer.run(layer.tensors, **{**TOLD, **options})


BRANCHES = {**TOLD, "attention_dropout": 0}
TWO = {**BRANCHES, "attention": "two_stream"}


@pytest.mark.parametrize(
    ("B", "told"),
    [
        *((5, each) for each in (TOLD, BRANCHES, {**TOLD, "dropout": 0})),
        *((5, {**each, "num_queries": 2}) for each in (TOLD, BRANCHES, {**TOLD, "dropout": 0})),
        (5, {**BRANCHES, "attention": "causal"}),
        *((6, {**TWO, "num_samples": wanted}) for wanted in (None, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{"rotated": True, "H": 1}, {"per_token": True}])
def test_a_layer_agrees_in_float64_at_every_policy(options, B, told, monkeypatch):
    # two samples at a time of the attention, of a layer, and less than one of the MLP
    monkeypatch.setattr(sys.modules["dbkernels.ops.attention"], "PAIRS", 2 * 3 * 25)
    monkeypatch.setattr(passes, "PART", 10)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", 3)
    layer = OneLayer(B, **options, dtypes=(torch.float64,) * 3)
    exact = layer.exact(**told)
    for recompute in EVERY_POLICY:
        assert_close(layer.with_grads(recompute=recompute, **told), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policies_give_the_same_bits_as_accurate_as_eager(dtype):
    layer = OneLayer(3, 37, 128, 1, hidden=160, dtypes=(dtype,) * 3)
    first, *others = (layer.with_grads(recompute=recompute, **TOLD) for recompute in SAME_BITS)
    for result in others:
        assert_same_bits(result, first)
    layer.assert_as_accurate_as_eager(first, **TOLD)


def test_kernels_leave_out_the_same_in_a_layer():
    layer = OneLayer(2, 5, 24, 2)
    with use_implementation("triton"):
        result = layer.with_grads(**TOLD)
    layer.assert_as_accurate_as_eager(result, **TOLD)


def test_a_sample_in_two_streams_leaves_out_the_same_in_a_batch_of_any_size():
    layer = OneLayer(6, dtypes=(torch.float64,) * 3)
    whole = layer.run(layer.tensors, **TWO)
    two = {n: t[[1, 2, 4, 5]] if n in ("x", "modulation") else t for n, t in layer.tensors.items()}
    some = layer.run(two, **{**TWO, "draw": Draw(DRAW.seed, DRAW.step, DRAW.sample + 1)})
    torch.testing.assert_close(some, whole[[1, 2, 4, 5]])
    # and not what the other stream does
    ones = torch.ones(2, 3, 64)
    masks = [dropout(ones, 0.5, DRAW, place=place) for place in (1, 2, 3, 4)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4


def test_the_first_tokens_are_the_first_of_all():
    layer = OneLayer(dtypes=(torch.float64,) * 3)
    whole = layer.run(layer.tensors, **TOLD)
    torch.testing.assert_close(layer.run(layer.tensors, num_queries=2, **TOLD), whole[:, :2])


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_nothing_more_is_kept(recompute):
    leaves = (layer := OneLayer(rotated=True)).leaves()
    plain, dropped = (
        saved_bytes(lambda told=told: layer.run(leaves, recompute=recompute, **told))
        for told in ({}, TOLD)
    )
    assert plain == dropped
