"""Fused layers in the place of those of somebody else's model, and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from dbkernels.convert.fused.known import KNOWN
from dbkernels.convert.fused.layer import FusedLayer
from dbkernels.convert.fused.probe import check_same, signature
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.settings import check_choice

UNKNOWN = "no layer of a class that is known"
COMPILED = (
    "OptimizedModule"  # torch.compile's, which has the forward of the module that it was given
)


class Replaced(NamedTuple):
    """A module in whose place a fused layer stands."""

    path: str
    """As `named_modules` tells it."""
    kind: str
    """Name of its class."""


class Left(NamedTuple):
    """A module with parameters that is as it was, outside of what was replaced."""

    path: str
    kind: str
    why: str


@dataclass(frozen=True)
class Fusion:
    """What `fuse` did."""

    replaced: tuple[Replaced, ...]
    """In the order of `named_modules`."""
    left: tuple[Left, ...]
    """Likewise: of modules inside each other that have nothing replaced, the outermost, or each
    element of a list."""

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)}"]
        lines += [f"  {path}  {kind}" for path, kind in self.replaced]
        lines += [f"left: {len(self.left)}"]
        lines += [f"  {path}  {kind}: {why}" for path, kind, why in self.left]
        return "\n".join(lines)


def fuse(model: nn.Module, recompute: Recompute = "none") -> Fusion:
    """Put a fused layer in the place of each layer of a class that is known.

    The model's own forward and training loop go on as they are. Parameters stay the same objects
    with the same names and values, so its state dict, and an optimizer that has them, are none the
    wiser. A layer that no fused one computes exactly is left, and so is all else.

    Args:
        model:      any; its modules are replaced in place
        recompute:  what each layer's backward computes again: a key of `dbkernels.ops.POLICIES`
    Returns:
        What was replaced, and what was left and why.
    Raises:
        ValueError: model is no module, is itself a layer or has fused ones already, or recompute is
            unknown. The model is as it was.
    """
    check_choice("recompute", recompute, POLICIES)
    _check_module(model)
    fused = [path for path, module in _all_modules(model) if isinstance(module, FusedLayer)]
    if fused:
        raise ValueError(
            f"model must have no fused layers, got {len(fused)} of them, the first is {fused[0]}: "
            "call unfuse before"
        )
    if (known := _knower(model)) is not None:
        raise ValueError(
            f"model must be what holds the layers, got one layer itself, a {type(model).__name__} "
            f"that {known.__name__} would replace"
        )
    layers: dict[nn.Module, FusedLayer | str] = {}
    checked: set[object] = set()
    found, left = [], []
    for path, module in _outermost(model):
        if module not in layers:
            layers[module] = _made(model, path, module, recompute, checked)
        made = layers[module]
        if isinstance(made, FusedLayer):
            found.append((path, made))
        else:
            left.append(Left(path, type(module).__name__, made))
    # nothing of this raises: all are replaced or none
    for path, layer in found:
        _put(model, path, layer)
    replaced = (Replaced(path, type(layer.original).__name__) for path, layer in found)
    return Fusion(tuple(replaced), tuple(left))


def unfuse(model: nn.Module) -> tuple[Replaced, ...]:
    """Put the modules back that `fuse` replaced, the same objects with the values of now.

    Returns:
        Those that are back.
    Raises:
        ValueError: model is no module, or is itself a fused layer.
    """
    _check_module(model)
    if isinstance(model, FusedLayer):
        raise ValueError("model must be what holds the fused layers, got one of them itself")
    fused = [pair for pair in _all_modules(model) if isinstance(pair[1], FusedLayer)]
    for path, layer in fused:
        _put(model, path, layer.restored())
    return tuple(Replaced(path, type(layer.original).__name__) for path, layer in fused)


def _check_module(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch.nn.Module, got a {type(model).__name__}")


def _knower(module: nn.Module) -> type[FusedLayer] | None:
    return next((known for known in KNOWN if known.knows(module)), None)


def _all_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return list(model.named_modules(remove_duplicate=False))


def _outermost(model: nn.Module, path: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules that are known, and those with parameters that neither are nor hold one."""
    for name, module in model._modules.items():
        if module is None:
            continue
        inside = f"{path}.{name}" if path else name
        if _knower(module) is not None:
            yield inside, module
        elif isinstance(module, nn.ModuleList) or _holds_known(module):
            yield from _outermost(module, inside)
        elif any(True for _ in module.parameters()):
            yield inside, module


def _holds_known(module: nn.Module) -> bool:
    return any(_knower(inside) is not None for inside in module.modules())


def _made(
    model: nn.Module, path: str, module: nn.Module, recompute: Recompute, checked: set[object]
) -> FusedLayer | str:
    """The layer for a module, or why there is none."""
    known = _knower(module)
    if known is None:
        return UNKNOWN
    names = path.split(".")[:-1]
    around = [model.get_submodule(".".join(names[:count])) for count in range(len(names) + 1)]
    if any(type(each).__name__ == COMPILED for each in around):
        return "inside a compiled module, which would go on without it: compile after fuse"
    try:
        layer = known(module, recompute)
        told = signature(layer)
        if told not in checked:
            check_same(layer)
            checked.add(told)
    except ValueError as error:
        return str(error)
    return layer


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    model.get_submodule(parent)._modules[name] = module
