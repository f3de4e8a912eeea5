"""Adapters of low rank on the projections of a model's layers, and nothing else to train.

    y = W x + b + (alpha / r) B A x,    W and b frozen

Hu et al. 2021 (arXiv:2106.09685), LoRA. A starts as `nn.Linear` does, kaiming uniform with
a = sqrt 5, and B at zero, as in peft: a model computes the same until something is trained. In a
state dict an adapter lies in its projection, as layers.0.attention.qkv.adapters.q.down (A) and .up.
A layer of two streams has the same targets in each, and in its second attention; cross_q, cross_kv
and cross_out are those of a layer's attention to another sequence.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, get_args

import torch
from torch import Tensor, nn

from dbkernels.models.branches import Attention
from dbkernels.models.cross_layer import CrossLayer
from dbkernels.models.joint_layer import JointLayer, Keys
from dbkernels.models.layer import AdaLNLayer
from dbkernels.models.low_rank import CHILD, LowRank
from dbkernels.models.parallel_layer import ParallelLayer
from dbkernels.ops.backend import checks
from dbkernels.ops.layer.gradients import is_quantized
from dbkernels.settings import check_choice, check_number

Layer = AdaLNLayer | ParallelLayer | JointLayer | CrossLayer
# the projection of each, and which third of its outputs; None is all
TARGETS: dict[str, tuple[str, int | None]] = {
    "q": ("attention.qkv", 0),
    "k": ("attention.qkv", 1),
    "v": ("attention.qkv", 2),
    "qkv": ("attention.qkv", None),
    "out": ("attention.out", None),
    "fc1": ("mlp.fc1", None),
    "fc2": ("mlp.fc2", None),
    "cross_q": ("cross.q", None),
    "cross_kv": ("cross.kv", None),
    "cross_out": ("cross.out", None),
    "modulation": ("modulation", None),
}
DEFAULT = ("q", "k", "v", "out")  # as in the libraries' own scripts


class Place(NamedTuple):
    """Where an adapter stands, or may stand."""

    part: str
    """Name in the model of the layer, or of one stream of it, or of its second attention."""
    target: str
    """A key of TARGETS."""
    projection: nn.Linear
    path: str
    """The projection's name in that part."""

    @property
    def name(self) -> str:
        """Of the adapter, for errors."""
        return f"{self.target} of {self.part}" if self.part else self.target

    @property
    def outputs(self) -> tuple[int, int]:
        """The first output that the adapter is added to, and how many."""
        width, third = self.projection.out_features, TARGETS[self.target][1]
        return (0, width) if third is None else (third * (width // 3), width // 3)


def add_adapters(
    model: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    targets: Sequence[str] = DEFAULT,
    layers: Sequence[int] | None = None,
) -> None:
    """Give layers of a model adapters, and freeze all its other parameters.

    The adapters are float32, or wider where the base is, on the base's device. Each runs in the
    dtype of its layer's branches, so nothing as large as the tokens is cast. A narrower base, in
    bfloat16, float16 or torchao's 8 bits, may be made before or after.

    Args:
        model:    with layers of this package, in place: a family, its `DiffusionBlocks`, or a layer
        rank:     r, at most the width of each target
        alpha:    the adapter is added alpha / r times; None is r
        targets:  keys of TARGETS
        layers:   numbers of the layers in the model's order; None is all
    Raises:
        ValueError: no layer is there, one is not as it was made, a layer has adapters already, a
            target or a number is unknown or given twice, or rank or alpha is out of range. The
            model is as it was then.
    """
    chosen = _chosen(_layers(model), layers)
    check_targets(targets)
    check_number("rank", rank, 1)
    alpha = float(rank if alpha is None else alpha)
    check_alpha(alpha)
    places = [place for place in _places(chosen) if place.target in targets]
    there = dict.fromkeys(place.target for place in _places(chosen))
    for target in targets:
        check_choice("target of these layers", target, there)
    _add(model, [(place, rank, alpha) for place in places])


def check_alpha(alpha: float) -> None:
    """Refuse an alpha that is no finite number above 0.

    Raises:
        ValueError: it is not.
    """
    if not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha must be a finite number above 0, got {alpha}")


class Numbers(NamedTuple):
    """Of one adapter, as a file has them."""

    down: Tensor
    """A (r, D_in)"""
    up: Tensor
    """B (outputs, r)"""
    alpha: float


@torch.no_grad()
def put_adapters(model: nn.Module, given: Mapping[tuple[str, str], Numbers]) -> None:
    """`add_adapters` of numbers that are there, by the part and the target of each `Place`.

    Raises:
        ValueError: as `add_adapters`, or a shape is not that of its place.
    """
    known, places = {(place.part, place.target): place for place in places_in(model)}, []
    for part in dict.fromkeys(part for part, _ in given):
        check_targets([target for other, target in given if other == part])
    for (part, target), numbers in given.items():
        if (part, target) not in known:
            raise ValueError(f"model must have {target} of {part}, got no such projection")
        place, rank = known[part, target], len(numbers.down)
        check_alpha(numbers.alpha)
        shapes = (rank, place.projection.in_features), (place.outputs[1], rank)
        got = tuple(numbers.down.shape), tuple(numbers.up.shape)
        if got != shapes:
            raise ValueError(f"A and B of {place.name} must be {shapes}, got {got}")
        places.append((place, rank, numbers.alpha))
    _add(model, places)
    for (place, _, _), numbers in zip(places, given.values(), strict=True):
        made = place.projection.get_submodule(CHILD)[place.target]
        made.down.copy_(numbers.down)
        made.up.copy_(numbers.up)


def _add(model: nn.Module, places: Sequence[tuple[Place, int, float]]) -> None:
    """Freeze a model and add adapters of a rank and an alpha each."""
    if first := next(adapters_in(model), None):
        raise ValueError(f"model must have no adapters yet, got {first[0].name}: remove them first")
    for place, rank, _ in places:
        most = min(place.projection.in_features, place.outputs[1])
        if rank > most:
            raise ValueError(f"rank must be at most {most}, the width of {place.name}, got {rank}")
    layers = _layers(model).values()
    for layer in layers:
        try:
            layer.check_inside()
        except RuntimeError as error:
            raise ValueError(str(error)) from None
    model.requires_grad_(False)
    for place, rank, alpha in places:
        weight, (start, outputs) = place.projection.weight, place.outputs
        made = LowRank(
            place.projection.in_features, outputs, rank,
            alpha=alpha, start=start, dtype=checks.statistics_dtype(weight), device=weight.device,
        )  # fmt: skip
        if CHILD not in place.projection._modules:
            place.projection.add_module(CHILD, nn.ModuleDict())
        place.projection.get_submodule(CHILD)[place.target] = made
    for layer in layers:
        layer.note_inside()


def places_in(model: nn.Module) -> Iterator[Place]:
    """Where a model may have adapters, in the order of the layers and of TARGETS."""
    return _places(_layers(model, least=0))


def adapters_in(model: nn.Module) -> Iterator[tuple[Place, LowRank]]:
    """Each adapter of a model and where it stands, in the order of the layers and of TARGETS."""
    for place in places_in(model):
        inside = place.projection._modules.get(CHILD)
        if isinstance(inside, nn.ModuleDict) and place.target in inside:
            yield place, inside[place.target]


def remove_adapters(model: nn.Module) -> None:
    """Take all adapters away; what is left is frozen, as it was.

    Raises:
        ValueError: there are none.
    """
    found = list(adapters_in(model))
    if not found:
        raise ValueError(f"model must have adapters, got a {type(model).__name__} without any")
    for place, _ in found:
        place.projection._modules.pop(CHILD, None)
    for layer in _layers(model).values():
        layer.note_inside()


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add each adapter to the weight that it stands beside, and take it away.

    The sum is rounded once, to the weight's dtype.

    Raises:
        ValueError: there are none, or a weight is of 8 bits. The model is as it was then.
    """
    found = list(adapters_in(model))
    for place, _ in found:
        if is_quantized(place.projection.weight):
            raise ValueError(f"the weight of {place.name} must be of floating point, got 8 bits")
    for place, adapter in found:
        product, start = adapter.product(), adapter.start
        rows = place.projection.weight[start : start + len(product)]
        rows.copy_(rows.to(product.dtype) + product)
    remove_adapters(model)


def check_targets(targets: Sequence[str]) -> None:
    """Refuse targets that are unknown, or that overlap.

    Raises:
        ValueError: with the first.
    """
    if not targets or isinstance(targets, str):
        raise ValueError(f"targets must be some of {', '.join(TARGETS)}, got {targets!r}")
    for place, target in enumerate(targets):
        check_choice("target", target, TARGETS)
        if target in targets[:place]:
            raise ValueError(f"targets must name each once, got {target} again")
    if "qkv" in targets and (other := {"q", "k", "v"} & set(targets)):
        raise ValueError(f"targets must not name both qkv and a part of it, got {min(other)}")


def _layers(model: nn.Module, *, least: int = 1) -> dict[str, Layer]:
    """By name, each once."""
    kinds = get_args(Layer)
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, kinds)}
    if len(found) < least:
        kind = type(model).__name__
        raise ValueError(f"model must have a layer of this package, got a {kind} without any")
    return found


def _chosen(found: dict[str, Layer], layers: Sequence[int] | None) -> dict[str, Layer]:
    names = list(found)
    for number in layers or ():
        if number not in range(len(names)):
            raise ValueError(f"layers must be 0 to {len(names) - 1}, got {number}")
    if layers is not None and len(set(layers)) != max(len(layers), 1):
        raise ValueError(f"layers must be some of a model's, each once, got {list(layers)}")
    return found if layers is None else {names[number]: found[names[number]] for number in layers}


def _places(layers: Mapping[str, Layer]) -> Iterator[Place]:
    for name, layer in layers.items():
        for part, module in _parts(name, layer):
            for target, (path, _) in TARGETS.items():
                # a second attention stands by itself
                path = path.removeprefix("attention.") if isinstance(module, Attention) else path
                above, _, own = path.rpartition(".")
                inside = module if not above else module._modules.get(above)
                # queries of a stream that is keys and values alone are computed by nobody
                unread = target == "q" and isinstance(module, Keys)
                if inside is not None and own in inside._modules and not unread:
                    yield Place(part, target, inside._modules[own], path)


def _parts(name: str, layer: Layer) -> Iterator[tuple[str, nn.Module]]:
    """What of a layer has projections by the names in TARGETS."""
    if not isinstance(layer, JointLayer):
        yield name, layer
        return
    for part in ("x", "context", "second"):
        if layer._modules.get(part) is not None:
            yield f"{name}.{part}" if name else part, layer._modules[part]
