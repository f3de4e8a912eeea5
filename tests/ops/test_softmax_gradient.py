import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from ops.logits import IGNORED, assert_gradient_is_accurate, logits, run
from ops.raw_calls import assert_calls_stay_within_their_tensors, opcheck_calls

from dbkernels.ops import activations, softmax_gradient
from dbkernels.ops.backend.register import use_implementation

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# (rows, V): one column, a ragged line, a whole line, more tiles than one of 64 columns
SHAPES = [(1, 1), (5, 37), (3, 64), (4, 150)]


@pytest.fixture(params=["triton", "torch"], autouse=True)
def implementation(request, monkeypatch):
    monkeypatch.setattr(softmax_gradient, "MAX_BLOCK", 64)
    with use_implementation(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_accurate_as_eager(shape, dtype):
    assert_gradient_is_accurate(*shape, dtype)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_any_number_of_rows_is_done_at_once(rows, monkeypatch):
    padded, target, scale = logits(9, 37, torch.bfloat16)
    expected = run(padded, target, scale, 37)
    monkeypatch.setattr(activations, "CHUNK", rows * 64 // torch.get_num_threads())
    torch.testing.assert_close(run(padded, target, scale, 37), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_logits_do_not_overflow(dtype):
    padded, target, scale = logits(2, 130, dtype)
    padded[:, :130] = 0
    padded[0, 129], padded[1, 3] = 1e4, -1e4
    target[:], scale[:] = torch.tensor([0, 3]), 1
    nll, dx = run(padded, target, scale, 130)
    large = padded[0, 129].float().item()
    assert nll.tolist() == pytest.approx([large, large + math.log(129)], rel=1e-6)
    assert dx[0, [0, 1, 129]].tolist() == [-1, 0, 1]
    assert dx[1, [0, 3]].tolist() == pytest.approx([1 / 129, -1], rel=1e-2)


def test_columns_that_cannot_be_have_no_probability():
    padded, target, scale = logits(2, 150)
    padded[:, :100] = -math.inf  # more than the whole first tile
    target[:], scale[:] = 120, 1
    nll, dx = run(padded, target, scale, 150)
    torch.testing.assert_close(
        nll, F.cross_entropy(padded[:, 100:150], target - 100, reduction="none")
    )
    assert not dx[:, :100].any() and dx.isfinite().all()


def test_a_fault_upstream_stays_visible_in_its_row():
    padded, target, scale = logits(4, 150)
    padded[0, 70], padded[3, :150] = math.nan, -math.inf
    target[:], scale[:] = 5, 1
    nll, dx = run(padded, target, scale, 150)
    assert nll.isnan().tolist() == [True, False, False, True]
    assert dx.isnan().all(1).tolist() == dx.isnan().any(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize("target", [-1, 37, 63, 2**40])
def test_an_unknown_target_that_nobody_looks_at_has_a_loss_of_nan(target, implementation):
    padded, targets, scale = logits(3, 37)
    targets[:], scale[:] = torch.tensor([1, IGNORED, target]), torch.tensor([1, 0, 1])
    launcher, nll = getattr(softmax_gradient, f"_gradient_{implementation}"), torch.empty(3)
    launcher(padded, targets, scale, nll, 37, IGNORED)
    assert nll.isnan().tolist() == [False, False, True]
    assert padded[:, :37].isnan().all(1).tolist() == [False, False, True]
    assert padded[:2, :37].isfinite().all()


@pytest.mark.parametrize("V", [1, 64, 65])
def test_rows_begin_on_a_line(V):
    padded = softmax_gradient.empty_logits(3, V, torch.bfloat16, None)
    assert padded.shape == (3, 64 if V <= 64 else 128) and padded.is_contiguous()


@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_is_a_well_formed_torch_op_that_writes_its_outputs_alone(scaled, dtype):
    padded, target, scale = logits(3, 64, dtype)
    call = partial(run, padded, target, scale if scaled else None, 64)
    opcheck_calls(call)
    assert_calls_stay_within_their_tensors(call)
