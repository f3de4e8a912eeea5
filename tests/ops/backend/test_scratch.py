import math
from unittest.mock import patch

import pytest
import torch
from ops.one_layer import OneLayer
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.ops.backend.register import dry_run_on_gpu, scratch_bytes, use_implementation
from dbkernels.ops.philox import Draw
from dbkernels.ops.score_loss import score_loss

T, D, H, FLOAT32 = 64, 32, 2, 4


class Scratch(TorchDispatchMode):
    """Scratch of each op, by name: what is counted, and what its launcher allocates."""

    def __init__(self):
        super().__init__()
        self.bytes, self.allocated = {}, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("dbkernels::")
        if size := scratch_bytes(func, args):
            self.bytes[name] = size
        if func.namespace != "dbkernels":
            return func(*args, **(kwargs or {}))
        # nothing else in a launcher makes a tensor by this name
        with patch.object(torch, "empty", wraps=torch.empty) as empty:
            func(*args)
        if empty.called:
            shapes = (call.args[0] for call in empty.call_args_list)
            self.allocated[name] = FLOAT32 * sum(map(math.prod, shapes))


def layer_scratch(mlp="gelu", qk_norm=False, *, processors, samples):
    layer = OneLayer(samples, T, D, H, hidden=4 * D, mlp=mlp, qk_norm=qk_norm)
    with dry_run_on_gpu(processors), Scratch() as scratch:
        layer.run(layer.leaves()).sum().backward()
    return scratch


# 4 programs of one processor: with one to each sample a norm has nothing to add up
@pytest.mark.parametrize(("processors", "samples"), [(1, 3), (1, 4), (3, 2)])
@pytest.mark.parametrize("options", [{}, {"mlp": "swiglu", "qk_norm": True}], ids=str)
def test_a_layer_s_launchers_allocate_what_is_counted(options, processors, samples):
    with use_implementation("triton"):
        scratch = layer_scratch(**options, processors=processors, samples=samples)
    assert ("gated_adaln_norm_bwd" in scratch.bytes) == (samples < 4)
    assert scratch.bytes == scratch.allocated


@pytest.mark.parametrize("elements", [1024, 1025, 3000])
def test_the_score_loss_allocates_what_is_counted(elements):
    z0 = torch.ones(3, elements)
    with use_implementation("triton"), Scratch() as scratch:
        score_loss(z0, z0, torch.ones(3), torch.ones(3), Draw(0, 0))
    expected = {"score_loss_fwd": FLOAT32 * 3 * -(-elements // 1024)} if elements > 1024 else {}
    assert scratch.bytes == scratch.allocated == expected
