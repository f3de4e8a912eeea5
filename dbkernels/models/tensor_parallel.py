"""A layer that several processes share: tensor parallelism.

Each of n ranks has 1 / n of the heads and of the MLP's hidden columns, and makes 1 / n of the
modulation. `dbkernels.ops.layer.ranks` tells what they send each other. A model goes on as it did:
x, c and what a layer returns are the same on every rank, as are the weights that are not cut and
their gradients.

Layers are cut first, then sharded over other processes, by `fully_shard` or DDP, then given to an
optimizer. Ranks of one group must run the same layers on the same samples. The norm of all
gradients is that of each cut parameter summed over the ranks, and of every other counted once.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dbkernels.models.cross_layer import CrossLayer
from dbkernels.models.joint_layer import JointLayer
from dbkernels.models.layer import AdaLNLayer, Projection
from dbkernels.models.low_rank import LowRank
from dbkernels.models.parallel_layer import ParallelLayer
from dbkernels.ops.layer.ranks import Ranks

Layer = AdaLNLayer | ParallelLayer | CrossLayer | JointLayer


@dataclass(frozen=True)
class Cut:
    """How one parameter is cut: of n ranks each has 1 / n of every part, and those one after
    another."""

    dim: int
    """0 is by rows, the outputs of a projection; 1 by columns, its inputs."""
    parts: int = 1
    """As many as are cut for themselves: queries, keys and values, or the halves of swiglu."""

    def of(self, whole: Tensor, rank: int, size: int) -> Tensor:
        """What a rank of so many has, a copy.

        Raises:
            ValueError: rank is not one of them, or the tensor has another number of rows, or
                columns, than `size` ranks can share.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank must be from 0 to {size - 1}, got {rank}")
        if whole.dim() <= self.dim or whole.shape[self.dim] % (self.parts * size):
            raise ValueError(
                f"whole must have a multiple of {self.parts} * {size} along dimension {self.dim}, "
                f"got {tuple(whole.shape)}"
            )
        own = whole.unflatten(self.dim, (self.parts, size, -1)).select(self.dim + 1, rank)
        return own.clone(memory_format=torch.contiguous_format).flatten(self.dim, self.dim + 1)

    def join(self, slices: Sequence[Tensor]) -> Tensor:
        """The whole again, from what each rank has, in their order."""
        by_part = [own.unflatten(self.dim, (self.parts, -1)) for own in slices]
        return torch.stack(by_part, self.dim + 1).flatten(self.dim, self.dim + 2)


# of the projections of a layer, by the last of their names; fc1 depends on the activation
_BY_OUTPUTS = {"qkv": Cut(0, 3), "q": Cut(0), "kv": Cut(0, 2), "modulation": Cut(0)}
_BY_INPUTS = ("out", "fc2")  # whose biases are whole


def cuts(layer: Layer) -> dict[str, Cut]:
    """How each parameter of a layer is cut, by its name; those not named are whole on every rank.

    The same before and after `cut_layer`.
    """
    _check_kind(layer)
    by_outputs = _BY_OUTPUTS | {"fc1": Cut(0, 2 if layer.config.mlp == "swiglu" else 1)}
    found = {}
    for name, _ in layer.named_parameters():
        *_, projection, kind = name.split(".")
        if projection in by_outputs:
            found[name] = by_outputs[projection]
        elif projection in _BY_INPUTS and kind == "weight":
            found[name] = Cut(1)
    return found


def cut_layer(layer: Layer, group: dist.ProcessGroup) -> None:
    """Keep this rank's part of a layer that is the same on every rank of a group, in its place.

    Cut parameters are new ones, with the names and the settings of the old: hooks of those, and an
    optimizer that has them, know nothing of it. The layer's config tells of its own heads and
    hidden columns from then on, so what is kept and computed is 1 / n of them too.

    A cut layer has no adapters, no attention_dropout and no weights in several tensors; it runs
    neither in plain torch, by `use_baseline` or `torch.export`, nor compiled.

    Args:
        layer:  with all of its parameters
        group:  of the ranks that share it
    Raises:
        ValueError: the layer is of another kind, is cut already, or has adapters, another way to
            run or attention_dropout; this process is not in the group; or the group's size does not
            divide num_heads, mlp_hidden or the modulation's width.
    """
    _check_kind(layer)
    if not isinstance(group, dist.ProcessGroup):
        raise ValueError(f"group must be a ProcessGroup that this process is in, got {group}")
    ranks, config = Ranks(group), layer.config
    size = ranks.size
    if layer.ranks is not None:
        raise ValueError(f"layer must be whole, got one of {layer.ranks.size} ranks")
    if layer.run is not None:
        raise ValueError(f"run of a layer on several ranks must be None, got {layer.run}")
    if any(isinstance(module, LowRank) for module in layer.modules()):
        raise ValueError("layer must have no adapters, got some")
    if config.attention_dropout:
        raise ValueError(
            f"attention_dropout must be 0 on several ranks, got {config.attention_dropout}"
        )
    for name in ("num_heads", "mlp_hidden"):
        if getattr(config, name) % size:
            raise ValueError(
                f"{name} must be a multiple of the group's size {size}, got {getattr(config, name)}"
            )
    parameters = dict(layer.named_parameters())
    own = {name: cut.of(parameters[name], ranks.rank, size) for name, cut in cuts(layer).items()}
    _put(layer, own, parameters)
    layer.config = replace(
        config,
        num_heads=config.num_heads // size,
        mlp_hidden=config.mlp_hidden // size,
        head_dim=config.attention_width // config.num_heads,
    )
    layer.ranks = ranks
    for module in layer.modules():
        if isinstance(module, Projection):
            module.ranks = ranks


@torch.no_grad()
def _put(layer: Layer, own: Mapping[str, Tensor], parameters: Mapping[str, nn.Parameter]) -> None:
    """Parameters of these values in the places of others."""
    for name, value in own.items():
        path, _, kind = name.rpartition(".")
        projection, old = layer.get_submodule(path), parameters[name]
        setattr(projection, kind, nn.Parameter(value.detach(), requires_grad=old.requires_grad))
        if isinstance(projection, nn.Linear) and kind == "weight":
            projection.out_features, projection.in_features = value.shape


def _check_kind(layer: nn.Module) -> None:
    if not isinstance(layer, Layer):
        kinds = "AdaLNLayer, ParallelLayer, CrossLayer or JointLayer"
        raise ValueError(f"layer must be an {kinds}, got a {type(layer).__name__}")
