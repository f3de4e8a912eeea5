import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops import LayerWeights, adaln_layer
from dbkernels.ops._path import rehearse_gpu
from dbkernels.ops._tile import partial_sums
from dbkernels.ops.scratch import scratch_bytes

B, T, D, H, FLOAT32 = 2, 64, 32, 2, 4
PROCESSORS = 132


class Scratch(TorchDispatchMode):
    """Scratch of each op, by name."""

    def __init__(self):
        super().__init__()
        self.bytes = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if size := scratch_bytes(func, args):
            self.bytes[func.name().removeprefix("dbkernels::")] = size
        return func(*args, **(kwargs or {}))


def layer_scratch(mlp="gelu", qk_norm=False, processors=PROCESSORS, samples=B):
    hidden = 4 * D
    shapes = [(3 * D, D), (3 * D,), (D, D), (D,), (hidden, D), (hidden,), (D, hidden), (D,)]
    if mlp == "swiglu":
        shapes[4:6] = [(2 * hidden, D), (2 * hidden,)]
    shapes += [(D // H,)] * 2 if qk_norm else []
    weights = LayerWeights(*(torch.ones(shape, requires_grad=True) for shape in shapes))
    modulation = torch.ones(samples, 6 * D, requires_grad=True)
    x = torch.ones(samples, T, D, requires_grad=True)
    with rehearse_gpu(processors), Scratch() as scratch:
        adaln_layer(x, modulation, weights, heads=H, mlp=mlp).sum().backward()
    return scratch.bytes


def test_programs_that_share_a_sample_have_sums_of_their_own():
    found = layer_scratch()
    # more programs than rows: each has one tile of 4 rows
    splits = T // 4
    assert found["adaln_norm_bwd"] == FLOAT32 * splits * B * D * 2
    assert found["gated_adaln_norm_bwd"] == FLOAT32 * splits * B * D * 3
    assert found["gated_residual_bwd"] == FLOAT32 * splits * B * D


def test_strips_and_heads_have_sums_too():
    assert layer_scratch()["gelu_bwd"] % (FLOAT32 * 4 * D) == 0
    assert layer_scratch(mlp="swiglu")["swiglu_bwd"] % (FLOAT32 * 2 * 4 * D) == 0
    assert layer_scratch(qk_norm=True)["qk_norm_rotary_bwd"] % (FLOAT32 * 2 * D // H) == 0


def test_forwards_and_ops_of_others_have_none():
    assert all(name.endswith("_bwd") for name in layer_scratch())
    assert scratch_bytes(torch.ops.aten.mm.default, (torch.ones(2, 2), torch.ones(2, 2))) == 0


def test_with_a_program_to_each_sample_there_is_nothing_to_add_up():
    # 4 programs of one processor
    assert "gated_adaln_norm_bwd" in layer_scratch(processors=1, samples=3)
    assert "gated_adaln_norm_bwd" not in layer_scratch(processors=1, samples=4)


@pytest.mark.parametrize("splits", [1, 3])
def test_a_launcher_allocates_as_many_sums_as_are_counted(splits):
    outs = [torch.zeros(B, D), torch.zeros(B, D)]
    with partial_sums(splits, *outs) as sums:
        new = [s for s in sums if all(s is not out for out in outs)]
        allocated = sum(s.numel() * FLOAT32 for s in new)
        for s in sums:
            s.zero_()
    assert allocated == (0 if splits == 1 else FLOAT32 * splits * 2 * B * D)
