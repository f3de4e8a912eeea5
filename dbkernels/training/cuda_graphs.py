"""Steps of blocks as CUDA graphs: launched whole, where the host else launches op by op.

Graphs share one pool of memory, for no two run at once: all that a step allocates is free again at
its end but for a few numbers, and what it returns is copied out at once. A graph finds parameters,
samples and counts at the addresses that it was captured with; who moves them must `drop` it.
"""

from collections.abc import Callable, Hashable
from weakref import WeakSet

import torch
from torch import Tensor

Step = Callable[[], tuple[Tensor, ...]]


class CudaRecorder:
    """Runs a step as it comes, or records it as a CUDA graph without running it.

    Args:
        device:  to train on
    Raises:
        ValueError: the device is no NVIDIA GPU.
    """

    def __init__(self, device: torch.device):
        if device.type != "cuda":
            raise ValueError(f"cuda_graphs must be run on an NVIDIA GPU, got device {device}")
        # the gradients' nodes stay on the stream of the step that made them
        self._stream = torch.cuda.Stream(device)
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def warm_up(self, step: Step) -> tuple[Tensor, ...]:
        """Run a step where the next one will be recorded."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return step()
        finally:
            current.wait_stream(self._stream)

    def record(self, step: Step) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """What replays the step, and the tensors that then hold what it returns."""
        # a pool that no graph is left of cannot be used again
        pool = next((graph.pool() for graph in self._graphs), None)
        graph = torch.cuda.CUDAGraph()
        # the default mode would also forbid much to the thread that copies blocks meanwhile
        capture = torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        )
        with capture:
            outputs = step()
        self._graphs.add(graph)
        return graph.replay, outputs


class CudaGraphs:
    """Runs each kind of step first op by op, then as a graph.

    Args:
        recorder:  of the graphs
    """

    def __init__(self, recorder: CudaRecorder):
        self._recorder = recorder
        self._warm: set[Hashable] = set()
        self._recorded: dict[Hashable, tuple[Callable[[], None], tuple[Tensor, ...]]] = {}

    def run(self, kind: Callable[[], Hashable], step: Step) -> tuple[Tensor, ...]:
        """Run a step.

        Args:
            kind:  of the step as it would run now: one graph serves all steps of a kind. The step
                   itself may change it, where it finds that it must go another way
            step:  what it does on the device; it reads nothing back, and nothing from the host that
                   differs between two steps of a kind
        Returns:
            What the step returned, in tensors that later steps leave alone.
        """
        asked = kind()
        if asked not in self._warm:
            # a step op by op cannot use the graphs' pool, and may find no room beside it
            self.drop()
            # what a first step loads, compiles and tries out cannot be recorded
            outputs = self._recorder.warm_up(step)
            self._warm.add(asked)
            return outputs
        if asked not in self._recorded:
            self._recorded[asked] = self._recorder.record(step)
            if kind() != asked:
                del self._recorded[asked]
                return self.run(kind, step)
        replay, outputs = self._recorded[asked]
        replay()
        return tuple(output.clone() for output in outputs)

    def drop(self) -> None:
        """Forget all graphs, and free their memory."""
        self._recorded.clear()
