"""A benchmark of a GPU on a CPU: the same programs, whose figures then mean nothing.

What torch.compile would generate code for runs in plain torch; all else that it does, from the
guards to the cut of forward and backward under a budget, is done. The presets have one more, which
is small.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch

from dbkernels.models import dit

PRESET = "rehearsal"
SMALL = replace(dit.PRESETS["digits"], dim=32, depth=3, num_heads=2)


@contextmanager
def rehearsing(really: bool) -> Iterator[None]:
    """Generate no code within, and know the small preset.

    Args:
        really:  whether; else nothing is changed
    """
    if not really:
        yield
        return
    from torch._dynamo.backends.debugging import boxed_nop
    from torch._inductor import compile_fx as inductor

    inner = {"inner_compile": lambda graph, inputs, **_: boxed_nop(graph, inputs)}
    in_plain_torch = partial(inductor.compile_fx, **inner)
    with (
        mock.patch.dict(dit.PRESETS, {PRESET: SMALL}),
        mock.patch.object(inductor, "compile_fx", in_plain_torch),
        # from a cache would come the kernels of a real run, and into it would go none
        torch._functorch.config.patch(enable_autograd_cache=False),
    ):
        yield
