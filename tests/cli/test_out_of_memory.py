import pytest
import torch

from dbkernels.cli.out_of_memory import out_of_memory


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "CUDA out of memory"),
        (MemoryError(), "out of memory"),
        (RuntimeError("at alloc.cpp:1 DefaultCPUAllocator: not enough"), "not enough"),
        (RuntimeError("shapes differ"), None),
        (ValueError("DefaultCPUAllocator: not enough"), None),
    ],
)
def test_only_a_lack_of_memory_has_a_sentence(error, sentence):
    assert out_of_memory(error) == sentence


def test_the_hosts_own_error_is_known():
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**62, dtype=torch.uint8)
    assert "allocate" in out_of_memory(error.value)
