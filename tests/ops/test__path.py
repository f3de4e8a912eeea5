import torch

from dbkernels.ops._path import rehearse_gpu, rehearsed_processors, takes_gpu_path
from dbkernels.ops._projection import add_product
from dbkernels.ops._tile import processors

CPU = torch.device("cpu")


def test_a_cpu_goes_its_own_way_unless_a_gpu_is_rehearsed():
    x = torch.ones(2)
    assert not takes_gpu_path(x) and rehearsed_processors() is None and processors(CPU) == 1
    with rehearse_gpu(132):
        assert takes_gpu_path(x) and rehearsed_processors() == processors(CPU) == 132
        with rehearse_gpu(108):
            assert processors(CPU) == 108
        assert processors(CPU) == 132
    assert not takes_gpu_path(x) and processors(CPU) == 1


def test_an_error_ends_the_rehearsal():
    try:
        with rehearse_gpu(132):
            raise KeyError
    except KeyError:
        pass
    assert rehearsed_processors() is None


def test_a_rehearsed_gpu_multiplies_bfloat16_into_float32():
    seen = []

    class Ops(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.name())
            return func(*args, **(kwargs or {}))

    left, right = (torch.ones(2, 2, dtype=torch.bfloat16, device="meta") for _ in range(2))
    with rehearse_gpu(132), Ops():
        add_product(torch.zeros(2, 2, device="meta"), left, right)
    assert "aten::mm.dtype" in seen
