"""A CUDA graph for tests; where they are rehearsed, the ops themselves, run again."""

import torch
from training.recorded import OpRecorder


def capture(step, device):
    """What replays a step, and the tensors that it then writes; compiled kernels are needed."""
    if device.type == "cpu":
        return OpRecorder().record(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph.replay, outputs


def warm_up(step, device):
    """Run a step beside the current stream, as what autograd makes in a capture must be."""
    if device.type == "cpu":
        return step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs = step()
    torch.cuda.current_stream().wait_stream(stream)
    return outputs
