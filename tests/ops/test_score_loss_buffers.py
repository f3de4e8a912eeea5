"""Where the gradients of the score loss lie, and when they may be written over."""

import pytest
import torch
from implementations import implementations
from ops.score_case import DRAW, DTYPES, inputs, results

from dbkernels.ops.backend.register import use_implementation
from dbkernels.ops.score_loss import score_loss, score_loss_


@pytest.fixture(params=implementations("score_loss_fwd"), autouse=True)
def implementation(request):
    with use_implementation(request.param):
        yield request.param


@pytest.mark.parametrize("asked", [(True, False), (False, True), (False, False)])
def test_only_the_gradients_that_are_needed_are_kept(asked):
    prediction, z0, sigma = inputs((3, 9))
    expected = results(score_loss, prediction, z0, sigma, DRAW, sigma_data=0.5)
    leaves = [t.requires_grad_(needed) for t, needed in zip((prediction, z0), asked, strict=True)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss, _ = score_loss(*leaves, sigma, DRAW, sigma_data=0.5)
    assert len(kept) == sum(asked) and torch.equal(loss.detach(), expected[0])
    for leaf, grad in zip(leaves, expected[2:], strict=True):
        if leaf.requires_grad:
            (actual,) = torch.autograd.grad(loss, leaf, torch.tensor(-2.0))
            assert torch.equal(actual, grad)


def test_a_graph_that_is_kept_gives_its_gradient_again():
    prediction, z0, sigma = inputs((3, 9))
    loss, _ = score_loss(prediction.requires_grad_(), z0, sigma, DRAW, sigma_data=0.5)
    upstream = torch.tensor(3.0)
    (first,) = torch.autograd.grad(loss, prediction, upstream, retain_graph=True)
    (second,) = torch.autograd.grad(loss, prediction, upstream)
    assert torch.equal(first, second) and first.data_ptr() != second.data_ptr()


def over_prediction(prediction, z0, sigma, draw, **options):
    return score_loss_(prediction * 1, z0, sigma, draw, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_may_go_over_the_prediction(dtype):
    args = inputs((3, 1040), dtype)
    mask = torch.rand(3, 1040) > 0.5
    expected = results(score_loss, *args, DRAW, sigma_data=0.5, mask=mask)
    actual = results(over_prediction, *args, DRAW, sigma_data=0.5, mask=mask)
    assert all(map(torch.equal, actual, expected))


def test_the_gradient_lies_where_the_prediction_lay():
    prediction, z0, sigma = inputs((3, 9))
    computed = prediction.requires_grad_() + 0
    grads = []
    computed.register_hook(grads.append)
    loss, _ = score_loss_(computed, z0, sigma, DRAW, sigma_data=0.5)
    loss.backward()
    assert grads[0].data_ptr() == computed.data_ptr()


@pytest.mark.parametrize("required", [False, True])
def test_without_a_gradient_nothing_is_written(required):
    prediction, z0, sigma = inputs((3, 9))
    computed = prediction.requires_grad_(required) + 0
    with torch.set_grad_enabled(not required):
        score_loss_(computed, z0, sigma, DRAW, sigma_data=0.5)
    assert torch.equal(computed, prediction)


# a graph that is kept is not scaled in place, which would tell as well
@pytest.mark.parametrize("kept", [False, True])
def test_whoever_saved_the_prediction_is_told(kept):
    prediction, z0, sigma = inputs((3, 9))
    computed = prediction.requires_grad_().tanh()
    loss, _ = score_loss_(computed, z0, sigma, DRAW, sigma_data=0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(retain_graph=kept)


def test_rejects_a_leaf_to_write_over():
    prediction, z0, sigma = inputs((3, 5))
    with pytest.raises(ValueError, match="prediction must be computed, got a leaf"):
        score_loss_(prediction.requires_grad_(), z0, sigma, DRAW, sigma_data=0.5)
