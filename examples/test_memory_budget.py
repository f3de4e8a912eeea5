"""Hold a training step to a memory budget in a test, on a machine without a GPU.

    python -m pytest examples/test_memory_budget.py

Nothing is allocated and nothing computed, so it takes a second for a model of any size. A change
that makes the step need more fails, and says which category has grown.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels import AdaLNLayer, LayerConfig
from dbkernels.memory.budget import require_within
from dbkernels.models import run_layers

DIM, DEPTH, BATCH, TOKENS = 1152, 28, 32, 256  # of DiT-XL/2
CEILINGS = {"none": "18 GiB", "qkv": "11.5 GiB", "layer": "10.5 GiB"}  # by recompute


@pytest.mark.parametrize(("recompute", "ceiling"), CEILINGS.items())
def test_a_step_stays_within_its_budget(recompute, ceiling):
    with FakeTensorMode():  # tensors without contents
        config = LayerConfig(DIM, 16, 4 * DIM, DIM, recompute=recompute)
        layers = torch.nn.ModuleList(AdaLNLayer(config) for _ in range(DEPTH))
        optimizer = torch.optim.AdamW(layers.parameters())
        x, c = torch.randn(BATCH, TOKENS, DIM), torch.randn(BATCH, DIM)

        def step():
            run_layers(list(layers), x, c).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        require_within(step, model=layers, optimizers=[optimizer], inputs=[x, c], ceiling=ceiling)
