"""What a family's adapters are called in the code whose modules they shall stand in.

own        layers.0.attention.qkv               any family
dit        blocks.0.attn.qkv                    facebookresearch/DiT
diffusers  transformer_blocks.0.attn1.to_q      DiTTransformer2DModel, with q, k and v apart
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dbkernels.convert.diffusers_names import names_of
from dbkernels.convert.dit_names import published_name
from dbkernels.models.adapter import Numbers, adapters_in, places_in
from dbkernels.models.dit import DiT
from dbkernels.settings import check_choice
from dbkernels.training.diffusion_blocks import DiffusionBlocks

Names = Literal["own", "dit", "diffusers"]
STACKS: dict[str, Names] = {
    "layers": "own", "blocks": "dit", "transformer_blocks": "diffusers"
}  # fmt: skip
PARTS = ("q", "k", "v")
Key = tuple[str, str]  # part and target of a `Place`


def adapters_by_name(
    model: nn.Module, names: Names | None, layers: Sequence[int] | None
) -> dict[str, Numbers]:
    """The adapters of a model's layers, by the names of their modules.

    Raises:
        ValueError: as `save_adapters`.
    """
    family, prefix = _family(model)
    system: Names = ("diffusers" if isinstance(family, DiT) else "own") if names is None else names
    _check_names(family, system)
    depth = len(family.layers)
    for number in layers or ():
        if number not in range(depth):
            raise ValueError(f"layers must be 0 to {depth - 1}, got {number}")
    wanted = set(range(depth) if layers is None else layers)
    found: dict[str, dict[str, Numbers]] = {}
    paths: dict[tuple[str, str], str] = {}
    for place, adapter in adapters_in(model):
        part = place.part.removeprefix(prefix)
        if int(part.split(".")[1]) in wanted:
            numbers = Numbers(adapter.down.detach(), adapter.up.detach(), adapter.alpha)
            found.setdefault(part, {})[place.target] = numbers
            paths[part, place.target] = f"{part}.{place.path}"
    if not found:
        which = "" if layers is None else f" in layers {', '.join(map(str, layers))}"
        raise ValueError(f"model must have adapters{which}, got none")
    return {
        name: numbers
        for part, targets in found.items()
        for name, numbers in _named({t: paths[part, t] for t in targets}, targets, system).items()
    }


def places_of(model: nn.Module, numbers: Mapping[str, Numbers], where: Path) -> dict[Key, Numbers]:
    """Where the adapters of a file belong in a model.

    Raises:
        ValueError: the model has no module of one of these names.
    """
    family, prefix = _family(model)
    system = system_of(numbers, where)
    _check_names(family, system)
    known: dict[str, Key] = {}
    for place in places_in(model):
        projection = f"{place.part}.{place.path}".removeprefix(prefix)
        for name, own in _modules(projection, system).items():
            if own == place.target or (own is None and place.target not in PARTS):
                known[name] = place.part, place.target
    for name in numbers:
        if name not in known:
            kind = type(family).__name__
            raise ValueError(f"{name} of {where} must be a projection of the {kind}, got no such")
    return {known[name]: each for name, each in numbers.items()}


def system_of(numbers: Mapping[str, Numbers], where: Path) -> Names:
    """Whose names those of a file are.

    Raises:
        ValueError: nobody's that is known, or of several.
    """
    found = {STACKS.get(name.partition(".")[0]) for name in numbers}
    if len(found) != 1 or None in found:
        name = next(iter(numbers))
        raise ValueError(f"modules of {where} must be of one of {', '.join(STACKS)}, got {name}")
    return found.pop()


def _check_names(family: nn.Module, system: Names) -> None:
    check_choice("names", system, get_args(Names))
    if system != "own" and not isinstance(family, DiT):
        raise ValueError(f"names must be own for a {type(family).__name__}, got {system}")


def _family(model: nn.Module) -> tuple[nn.Module, str]:
    """The model that has the layers, and what stands before its names."""
    return (model.model, "model.") if isinstance(model, DiffusionBlocks) else (model, "")


def _modules(projection: str, system: Names) -> dict[str, str | None]:
    """Of layers.0.attention.qkv: modules by name, and which part of the outputs each has."""
    if system == "own":
        return {projection: None}
    published = published_name(f"{projection}.weight")
    if system == "dit":
        return {published.removesuffix(".weight"): None}
    # of a layer's own projections there is one, so the depth is not asked
    names = [name.removesuffix(".weight") for name in names_of(published, depth=1)]
    return dict(zip(names, PARTS, strict=True)) if len(names) == 3 else {names[0]: None}


def _named(
    paths: Mapping[str, str], targets: Mapping[str, Numbers], system: Names
) -> dict[str, Numbers]:
    """The adapters of one part of a layer by their modules' names, from their projections'."""
    found, parts = {}, {target: targets[target] for target in PARTS if target in targets}
    for target, numbers in targets.items():
        if target in PARTS:
            continue
        modules = _modules(paths[target], system)
        for rows, name in zip(numbers.up.chunk(len(modules)), modules, strict=True):
            found[name] = numbers._replace(up=rows)
    if parts:
        modules = _modules(paths[next(iter(parts))], system)
        if len(modules) > 1:
            found |= {name: parts[part] for name, part in modules.items() if part in parts}
        else:
            found[next(iter(modules))] = _together(parts)
    return found


def _together(parts: Mapping[str, Numbers]) -> Numbers:
    """One adapter of q, k and v that adds what those of the parts add.

    Its alpha / r is that of the first; B of another is multiplied by what its own is more.
    """
    first = next(iter(parts.values()))
    scale, rank = first.alpha / len(first.down), sum(len(each.down) for each in parts.values())
    rows = len(first.up)
    up, column = first.up.new_zeros((3 * rows, rank)), 0
    for part, each in parts.items():
        row, width = PARTS.index(part) * rows, len(each.down)
        factor = each.alpha / width / scale
        up[row : row + rows, column : column + width] = _times(each.up, factor)
        column += width
    return Numbers(torch.cat([each.down for each in parts.values()]), up, scale * rank)


def _times(up: Tensor, factor: float) -> Tensor:
    return up if factor == 1 else up * factor
