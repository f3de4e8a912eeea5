"""A model of which some layers are on the meta device: they have shapes and names, and no memory.

A process that trains one block needs no other's layers. What it has is the same, bit for bit, as
in the whole model: torch's generator draws for a layer that is absent too, one tensor at a time.
"""

import copy
from collections.abc import Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.models.family import FamilyModule

_aten = torch.ops.aten
DRAWING = (_aten.uniform_.default, _aten.normal_.default)  # all that initialise weights


def made_without(
    make: Callable[[], FamilyModule], absent: Callable[[int], Collection[int]]
) -> FamilyModule:
    """A new model without some of its layers, of which never more than one is in memory.

    Args:
        make:    makes the whole model, with torch's own generator, and the same way each time
        absent:  (number of layers) -> indices of those to leave out
    """
    with torch.device("meta"):
        place, count = _place_of_layers(make)
    left_out = set(absent(count))
    lists: list[nn.Module] = []

    def note(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if not isinstance(parent, nn.ModuleList) or child is None:
            return
        if not any(parent is known for known in lists):
            lists.append(parent)
        if lists[place] is parent and int(name) in left_out:
            to_meta(child)

    hook = register_module_module_registration_hook(note)
    try:
        with DrawingForAbsent():
            return make()
    finally:
        hook.remove()


def _place_of_layers(make: Callable[[], FamilyModule]) -> tuple[int, int]:
    """Which of the lists of modules that a model makes is that of its layers, and their number."""
    lists: list[nn.Module] = []

    def note(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        if isinstance(parent, nn.ModuleList) and not any(parent is known for known in lists):
            lists.append(parent)

    hook = register_module_module_registration_hook(note)
    try:
        layers = make().layers
    finally:
        hook.remove()
    return next(place for place, each in enumerate(lists) if each is layers), len(layers)


class DrawingForAbsent(TorchDispatchMode):
    """While it is on, torch's generator gives a tensor on the meta device its numbers too."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in DRAWING and args[0].is_meta:
            numbers = torch.empty_like(args[0], device="cpu", dtype=args[0].dtype)
            func(numbers, *args[1:], **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def to_meta(module: nn.Module, but: Iterable[nn.Module] = ()) -> None:
    """Take a module's parameters out of memory, in place, but for those of some modules inside."""
    absent = _absent_twins(module, but)
    for child in module.modules():
        for name, parameter in list(child.named_parameters(recurse=False, remove_duplicate=False)):
            if id(parameter) in absent:
                setattr(child, name, absent[id(parameter)])


def absent_copy(module: nn.Module, but: Iterable[nn.Module]) -> nn.Module:
    """A copy without memory, which has some of the modules inside in common with its original."""
    common: dict[int, object] = {id(each): each for each in but}
    return copy.deepcopy(module, common | _absent_twins(module, but))


def _absent_twins(module: nn.Module, but: Iterable[nn.Module]) -> dict[int, nn.Parameter]:
    """What stands in the place of each parameter, by its identity."""
    kept = {id(p) for each in but for p in each.parameters()}
    return {
        id(p): nn.Parameter(torch.empty_like(p, device="meta", dtype=p.dtype), p.requires_grad)
        for p in module.parameters()
        if id(p) not in kept
    }


def move(module: nn.Module, device: torch.device | str) -> None:
    """Move what a module has in memory; what is absent stays so."""
    for tensor in (*module.parameters(), *module.buffers()):
        if not tensor.is_meta:
            tensor.data = tensor.data.to(device)


def load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy weights, of all that the module would have, into what it has in memory.

    Raises:
        RuntimeError: names or shapes differ, as `load_state_dict` tells.
    """
    absent = {name for name, tensor in module.state_dict().items() if tensor.is_meta}
    if not absent <= weights.keys():
        raise RuntimeError(f"weights must have {sorted(absent - weights.keys())[0]}, got none")
    present = {name: tensor for name, tensor in weights.items() if name not in absent}
    missing, unexpected = module.load_state_dict(present, strict=False)
    if unexpected or set(missing) != absent:
        names = sorted({*unexpected, *(set(missing) ^ absent)})
        raise RuntimeError(f"weights must be those of {type(module).__name__}, got {names[0]}")
