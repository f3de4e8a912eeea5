from unittest.mock import patch

import pytest
import torch

from dbkernels.ops.layer.projection import cast

F32, BF16 = torch.float32, torch.bfloat16


def calls_of(tensors, dtype):
    """What cast gives, and how often it copied."""
    with patch.object(torch, "_foreach_copy_", wraps=torch._foreach_copy_) as copy:
        found = cast(tensors, dtype)
    return found, copy.call_count


def test_casts_all_at_once_to_the_same_bits_as_one_by_one():
    tensors = [torch.randn(3, 5), None, torch.randn(4), torch.randn(2, 2).T]
    found, calls = calls_of(tensors, BF16)
    assert calls == 1 and found[1] is None
    for copy, tensor in zip(found, tensors, strict=True):
        assert tensor is None or (copy.dtype == BF16 and torch.equal(copy, tensor.to(BF16)))


def test_copies_what_has_the_dtype_not_at_all():
    tensors = [torch.randn(3), torch.randn(2).to(BF16), None]
    found, calls = calls_of(tensors, BF16)
    assert calls == 1 and found[1] is tensors[1]
    assert calls_of(found, BF16) == (found, 0)


def test_sources_of_one_dtype_go_together():
    tensors = [torch.randn(3).to(dtype) for dtype in (BF16, F32, BF16, torch.float16)]
    found, calls = calls_of(tensors, F32)
    assert calls == 2
    for copy, tensor in zip(found, tensors, strict=True):
        assert torch.equal(copy, tensor.to(F32))


@pytest.mark.parametrize("tensor", [torch.randn(5, 3).T, torch.randn(2, 3, 4).transpose(0, 1)])
def test_a_copy_lies_in_memory_as_its_source(tensor):
    (copy,) = cast([tensor], BF16)
    assert copy.stride() == tensor.stride()


def test_a_source_with_holes_is_copied_too():
    whole = torch.randn(4, 6)
    (copy,) = cast([whole[:, :3]], BF16)
    assert torch.equal(copy, whole[:, :3].to(BF16))


def test_nothing_is_nothing():
    assert calls_of([None, None], BF16) == ([None, None], 0)
