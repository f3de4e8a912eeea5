"""What torch.compile makes of a function, as a competitor."""

from collections.abc import Callable, Mapping

import torch


def compiled(function: Callable, settings: Mapping[str, object]) -> Callable:
    """Compile by torch.compile's own backend, under settings of `torch._functorch.config`.

    Each call gives a compiled function of its own: the backend is part of what a cached one is
    found by, and under another it would come back compiled with the settings of the first.
    """
    # takes seconds to import, which is for those to pay who compile
    from torch._inductor.compile_fx import compile_fx

    def backend(graph, inputs):
        with torch._functorch.config.patch(dict(settings)):
            return compile_fx(graph, inputs)

    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
