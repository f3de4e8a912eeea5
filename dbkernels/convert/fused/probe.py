"""A layer and the module it stands for, run once on copies with random weights and compared.

What stands in a module's own forward no part shows, such as positions or another order of the
branches, and a library's next version may compute something else.
"""

import copy

import torch
from torch import Tensor, nn

from dbkernels.convert.fused.layer import FusedLayer, normal
from dbkernels.convert.read_block import TOLERANCE
from dbkernels.models.as_made import HOOKS


def check_same(layer: FusedLayer) -> None:
    """Run copies of a layer and of its original.

    Raises:
        ValueError: the original does not run as the layer does, or its result is another one.
    """
    random, kind = torch.Generator().manual_seed(0), type(layer.original).__name__
    eager = torch.compiler.set_stance("force_eager")  # some compile their forward
    as_it_is = torch.autocast("cpu", enabled=False)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), eager, as_it_is:
        original = _randomised(layer.original, random)
        twin = type(layer)(original, layer.recompute)
        given = twin.example(random)
        try:
            expected = _results(original, given)
        except Exception as error:
            raise ValueError(f"a {kind} must run as its fused layer does, got {error!r}") from error
        results = _results(twin, given)
    shapes = [[tuple(getattr(t, "shape", ())) for t in each] for each in (expected, results)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"results of {kind} must be {shapes[1]}, got {shapes[0]}")
    for actual, exact in zip(results, expected, strict=True):
        if exact is None:
            continue
        difference = (actual - exact).abs().max() / exact.abs().max()
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the forward of {kind} must compute what its parts say, got a result that differs "
                f"by {float(difference):.1e} of its size"
            )


def signature(layer: FusedLayer) -> tuple[object, ...]:
    """What tells two originals apart whose layers need no comparison each: all but the tensors."""
    told = [type(layer), type(layer.original)]
    for name, module in layer.original.named_modules():
        own = [(key, _told(value)) for key, value in sorted(vars(module).items()) if key[0] != "_"]
        shapes = [(key, tuple(p.shape)) for key, p in module.named_parameters(recurse=False)]
        told.append((name, type(module), tuple(own), tuple(shapes)))
    return tuple(told)


def _told(value: object) -> object:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    # what has nothing of its own, as a processor of attention, is what its class is
    return type(value) if getattr(value, "__dict__", None) == {} else repr(value)


def _randomised(original: nn.Module, random: torch.Generator) -> nn.Module:
    """A copy in training, its parameters random and each branch of the size of the stream."""
    twin = copy.deepcopy(original)
    if any(t.is_meta for t in (*twin.parameters(), *twin.buffers())):
        raise ValueError(f"a {type(original).__name__} must have numbers, got tensors on meta")
    twin = twin.to("cpu", torch.float64).train()
    for hooks in HOOKS:  # which are of either, and somebody's who does not expect this call
        getattr(twin, hooks).clear()
    for parameter in twin.parameters():
        numbers = normal(random, *parameter.shape)
        parameter.copy_(numbers * parameter.shape[-1] ** -0.5 + 0.1)
    return twin


def _results(module: nn.Module, given: object) -> list[Tensor]:
    torch.manual_seed(0)
    given = [t.clone() if isinstance(t, Tensor) else t for t in given]
    result = module(*given)
    return list(result) if isinstance(result, tuple) else [result]
