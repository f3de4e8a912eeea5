import pytest
import torch

from dbkernels.ops.layer.tensors import check_first, first_tokens

X = torch.arange(2 * 5 * 3.0).view(2, 5, 3)


@pytest.mark.parametrize("tokens", [1, 4])
def test_the_first_of_each_sample_hold_no_memory_of_the_others(tokens):
    first = first_tokens(X, tokens)
    assert torch.equal(first, X[:, :tokens]) and first.is_contiguous()
    assert first.untyped_storage().nbytes() == 2 * tokens * 3 * 4


@pytest.mark.parametrize("tokens", [None, 5])
def test_all_of_them_are_the_tensor_itself(tokens):
    assert first_tokens(X, tokens) is X


def test_the_others_have_no_gradient():
    x = X.clone().requires_grad_()
    first_tokens(x, 2).sum().backward()
    assert x.grad[:, :2].eq(1).all() and not x.grad[:, 2:].any()


@pytest.mark.parametrize("check", [lambda n: check_first(n, 5), lambda n: first_tokens(X, n)])
@pytest.mark.parametrize("tokens", [0, -1, 6, 2.0, "2"])
def test_rejects_what_is_no_number_of_tokens(tokens, check):
    message = f"num_queries must be an integer from 1 to T = 5, or None, got {tokens}"
    with pytest.raises(ValueError, match=message):
        check(tokens)


def test_an_empty_sequence_has_no_first_token():
    check_first(None, 0)
    with pytest.raises(ValueError, match="from 1 to T = 0, or None, got 1"):
        check_first(1, 0)
