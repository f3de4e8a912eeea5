import torch

from dbkernels.ops.backend.register import dry_run_on_gpu, dry_run_processors, runs_as_on_gpu
from dbkernels.ops.backend.tile import processors
from dbkernels.ops.layer.projection import add_product

CPU = torch.device("cpu")


def test_a_cpu_goes_its_own_way_outside_a_dry_run_on_a_gpu():
    x = torch.ones(2)
    assert not runs_as_on_gpu(x) and dry_run_processors() is None and processors(CPU) == 1
    with dry_run_on_gpu(132):
        assert runs_as_on_gpu(x) and dry_run_processors() == processors(CPU) == 132
        with dry_run_on_gpu(108):
            assert processors(CPU) == 108
        assert processors(CPU) == 132
    assert not runs_as_on_gpu(x) and processors(CPU) == 1


def test_an_error_ends_the_dry_run():
    try:
        with dry_run_on_gpu(132):
            raise KeyError
    except KeyError:
        pass
    assert dry_run_processors() is None


def test_a_dry_run_on_a_gpu_multiplies_bfloat16_into_float32():
    seen = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    left, right = (torch.ones(2, 2, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with dry_run_on_gpu(132), Ops():
        add_product(torch.zeros(2, 2, device="meta"), left, right)
    assert "aten::mm.dtype" in seen
