"""A benchmark of a GPU on a CPU: the same programs, whose figures then mean nothing.

What torch.compile would generate code for runs in plain torch; all else that it does, from the
guards to the cut of forward and backward under a budget, is done. The presets have one more, which
is small.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.graph import _BoxedCodeGen

from dbkernels.models import dit

PRESET = "rehearsal"
SMALL = replace(dit.PRESETS["digits"], dim=32, depth=3, num_heads=2)


@contextmanager
def small_preset(really: bool) -> Iterator[None]:
    """Know the small preset within.

    Args:
        really:  whether; else nothing is changed
    """
    with mock.patch.dict(dit.PRESETS, {PRESET: SMALL} if really else {}):
        yield


@contextmanager
def rehearsing(really: bool) -> Iterator[None]:
    """Generate no code within, and know the small preset.

    Args:
        really:  whether; else nothing is changed
    """
    if not really:
        yield
        return
    from torch._inductor import compile_fx as inductor

    in_plain_torch = partial(inductor.compile_fx, inner_compile=_plain)
    # from a cache would come the kernels of a real run, and into it would go none
    settings = torch._functorch.config.patch(enable_autograd_cache=False)
    patched = mock.patch.object(inductor, "compile_fx", in_plain_torch)
    with settings, small_preset(really), patched:
        yield


def _plain(
    graph: GraphModule, inputs: Sequence[Tensor], **_: object
) -> Callable[[list[Tensor]], object]:
    graph.graph.set_codegen(_BoxedCodeGen())
    graph.recompile()

    def run(inputs: list[Tensor]) -> object:
        return graph.forward(inputs)

    run._boxed_call = True
    return run
