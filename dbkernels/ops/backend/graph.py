"""What a function with matmuls of its own must know of the autocast and the graph it runs in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Of the matmuls of x and weight: autocast's where it is on, else the weight's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # which meta tensors do not have
        return torch.get_autocast_dtype(device)
    return weight.dtype


def dtypes_as_they_are(device: str) -> AbstractContextManager:
    """A backward has the dtypes of its forward, also where it is called under autocast."""
    return nullcontext() if device == "meta" else torch.autocast(device, enabled=False)


def is_last_to_read() -> bool:
    """Whether what was saved may be written over: not with retain_graph=True."""
    # a compiler reuses memory on its own, and its trace knows no graph task
    if torch.compiler.is_compiling():
        return False
    return not torch._C._autograd._get_current_graph_task_keep_graph()
