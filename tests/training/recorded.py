"""What a CUDA graph is, on a CPU: the ops of a step, run again on the same tensors.

Every op is recorded below autograd with its arguments: a tensor by its identity, a number by its
value of then. A replay runs the ops in order and puts what they return where it was. What the host
computed in between is as it was, as it is in a graph.
"""

from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training.tiny import make_trainer

import dbkernels.training.trainer as module

READS = (torch.ops.aten._local_scalar_dense.default,)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("a value was read back in a step that is captured")
        outputs = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, outputs))
        return outputs

    def replay(self):
        with torch.no_grad():
            for func, args, kwargs, outputs in self.calls:
                again = func(*args, **kwargs)
                for was, now in zip(tree_leaves(outputs), tree_leaves(again), strict=True):
                    if isinstance(was, Tensor) and was.data_ptr() != now.data_ptr():
                        was.copy_(now)


class OpRecorder:
    """Stands for the recorder of CUDA graphs.

    Args:
        moved:  gives what a step may move
    """

    def __init__(self, moved=list):
        self.moved, self.warm, self.recorded, self.replayed = moved, 0, 0, 0

    def warm_up(self, step):
        self.warm += 1
        return step()

    def record(self, step):
        ops = Ops()
        # a capture runs nothing: what the step moved is put back
        before = [(tensor, tensor.detach().clone()) for tensor in self.moved()]
        with ops:
            outputs = step()
        with torch.no_grad():
            for tensor, value in before:
                tensor.copy_(value)
        self.recorded += 1

        def replay():
            self.replayed += 1
            ops.replay()

        return replay, outputs


def make_captured(*arguments, device=None, **settings):
    """A trainer that replays its steps, and its recorder; None stands for that of a GPU."""
    make = partial(make_trainer, *arguments, device=device, cuda_graphs=True, **settings)
    if device is not None and device.type == "cuda":
        return make(), None

    def moved():
        # a block that is still on its way home must arrive there before all is put back
        trainer.offloader.wait()
        groups = trainer.groups.values()
        return [trainer.updater._finite, *(t for group in groups for t in group.tensors())]

    recorder = OpRecorder(moved)
    with patch.object(module, "CudaRecorder", lambda device: recorder):
        trainer = make()
    return trainer, recorder
