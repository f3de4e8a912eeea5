import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops.backend.register import (
    compute_dtype,
    dry_run_on_gpu,
    dry_run_processors,
    dtypes_as_they_are,
    is_last_to_read,
    runs_as_on_gpu,
)
from dbkernels.ops.backend.tile import processors
from dbkernels.ops.layer.projection import add_product


class Asks(torch.autograd.Function):
    """The identity, whose backward notes whether it is the last."""

    @staticmethod
    def forward(ctx, x, answers):
        ctx.answers = answers
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        ctx.answers.append(is_last_to_read())
        return dy, None


def test_the_last_to_read_is_the_backward_that_retains_no_graph():
    x, answers = torch.randn(3, requires_grad=True), []
    y = Asks.apply(x, answers).sum()
    for retain in (True, True, False):
        y.backward(retain_graph=retain)
    assert answers == [False, False, True]


def test_a_compiler_is_told_that_another_reads():
    compiled = torch.compile(lambda: is_last_to_read(), backend="eager", fullgraph=True)
    assert compiled() is False


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_matmuls_run_in_the_dtype_of_the_weight_or_in_that_of_autocast(dtype):
    x, weight = torch.randn(3, 2), torch.randn(4, 2, dtype=dtype)
    assert compute_dtype(x, weight) == dtype
    with torch.autocast(x.device.type, torch.bfloat16):
        assert compute_dtype(x, weight) == torch.bfloat16
        # which has no autocast
        assert compute_dtype(x.to("meta"), weight.to("meta")) == dtype


def test_a_backward_can_leave_autocast():
    x = torch.randn(3, 3)
    with torch.autocast(x.device.type, torch.bfloat16):
        with dtypes_as_they_are(x.device.type):
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
    with dtypes_as_they_are("meta"):
        assert (x @ x).dtype == torch.float32


# of a dry run


def test_a_cpu_goes_its_own_way_outside_a_dry_run_on_a_gpu():
    cpu = torch.device("cpu")
    x = torch.ones(2, device=cpu)
    assert not runs_as_on_gpu(x) and dry_run_processors() is None and processors(cpu) == 1
    with pytest.raises(KeyError), dry_run_on_gpu(132):
        assert runs_as_on_gpu(x) and dry_run_processors() == processors(cpu) == 132
        with dry_run_on_gpu(108):
            assert processors(cpu) == 108
        assert processors(cpu) == 132
        raise KeyError
    assert not runs_as_on_gpu(x) and dry_run_processors() is None and processors(cpu) == 1


def test_a_dry_run_on_a_gpu_multiplies_bfloat16_into_float32():
    seen = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    left, right = torch.ones(2, 2, 2, dtype=torch.bfloat16, device="meta")
    with dry_run_on_gpu(132), Ops():
        add_product(torch.zeros(2, 2, device="meta"), left, right)
    assert "aten::mm.dtype" in seen
