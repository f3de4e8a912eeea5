"""What a checkpoint holds of parameters and of what their updates need, and the way back."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from dbkernels.ops.layer.gradients import is_quantized
from dbkernels.training.checkpoint.shard import Parts, Shard, Tensors
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.parallel.placement import Placements, here
from dbkernels.training.param_group import ParamGroup
from dbkernels.training.saved import require_tensors

Groups = Mapping[str, ParamGroup]


def contents(blocks: DiffusionBlocks, groups: Groups, placements: Placements) -> Parts:
    """Weights, their average and the optimizers' state, by these three and by name.

    What this process holds a share of is there as a `Shard`.

    Raises:
        ValueError: a weight has fewer bits than its dtype says, which no checkpoint holds.
    """
    found: dict[str, dict[str, Tensor | Shard]] = {"model": {}, "ema": {}, "optimizer": {}}
    for name, parameter in _present(blocks):
        if is_quantized(parameter):
            kind = type(parameter).__name__
            raise ValueError(
                f"a checkpoint has no place for {name} of {kind}: save the adapters alone"
            )
        found["model"][name] = placements.held(parameter, here(parameter).detach())
    for group in groups.values():
        for name, tensor in group.average.items():
            found["ema"][name] = placements.held(group.parameters[name], tensor)
        for name, tensor in group.optimizer_tensors().items():
            found["optimizer"][name] = placements.held(_owner(group, name, tensor), tensor)
    return {name: tensors for name, tensors in found.items() if tensors}


def require_contents(saved: Tensors, expected: Parts) -> None:
    """Refuse what is not of the names, shapes and dtypes of what `contents` gives.

    Raises:
        ValueError: with the first that is another.
    """
    for group in {**saved, **expected}:
        like = {name: _whole(value) for name, value in expected.get(group, {}).items()}
        require_tensors(saved.get(group, {}), like, group)


@torch.no_grad()
def take_back(
    blocks: DiffusionBlocks,
    groups: Groups,
    placements: Placements,
    saved: Tensors,
    counters: Mapping[str, dict],
) -> None:
    """Go on from whole tensors that `require_contents` let through, and the groups' counts."""
    for name, parameter in _present(blocks):
        here(parameter).copy_(placements.part(parameter, saved["model"][name]))
    for name, group in groups.items():
        average, state = {}, {}
        for key in group.average:
            average[key] = placements.part(group.parameters[key], saved["ema"][key])
        for key, tensor in group.optimizer_tensors().items():
            owner = _owner(group, key, tensor)
            state[key] = placements.part(owner, saved["optimizer"][key])
        steps = counters["groups"][name]
        group.restore(steps, average, state, counters.get("optimizer", {}))


def _present(blocks: DiffusionBlocks) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are in memory."""
    return ((name, p) for name, p in blocks.named_parameters() if not p.is_meta)


def _owner(group: ParamGroup, name: str, tensor: Tensor) -> nn.Parameter | None:
    """The parameter whose state lies as it does itself; None where it is of another shape."""
    parameter = group.parameters.get(name.rpartition(".")[0])
    if parameter is None or here(parameter).shape != tensor.shape:
        return None
    return parameter


def _whole(value: Tensor | Shard) -> Tensor:
    """Shape and dtype of the whole."""
    if isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.local.dtype, device="meta")
