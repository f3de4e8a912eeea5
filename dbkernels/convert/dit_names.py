"""The tensors of a published DiT, by the names of facebookresearch/DiT, and a `DiT` of them.

    x_embedder.proj                        patch, whose weight has an image's axes (D, C, p, p)
    pos_embed                              made anew, and compared
    t_embedder.mlp.0, t_embedder.mlp.2     condition.fc1, condition.fc2
    y_embedder.embedding_table             label_table, whose last row is "no label"
    blocks.0, blocks.1, ...                layers.0, layers.1, ...: `dit_block` has their parts
    final_layer.adaLN_modulation.1         modulation.linear
    final_layer.linear                     head

Peebles & Xie 2023 (arXiv:2212.09748). Where it predicts a variance too, each pixel of a patch has C
rows of the noise in final_layer.linear and then C of the variance.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbkernels.convert.dit_block import PARTS
from dbkernels.convert.files import depth_of, sizes_of
from dbkernels.models.dit import PRESETS, DiT, DiTConfig
from dbkernels.models.embed import grid_positions

HEAD = ("final_layer.linear.weight", "final_layer.linear.bias")
POSITIONS = "pos_embed"
TOLERANCE = 1e-5  # of positions between -1 and 1: both are rounded, and their angles too
_STEM_AND_HEAD = {
    "patch": "x_embedder.proj",
    "condition.fc1": "t_embedder.mlp.0",
    "condition.fc2": "t_embedder.mlp.2",
    "label_table": "y_embedder.embedding_table",
    "modulation.linear": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
}
_OF_LAYER = {ours: theirs for theirs, ours in PARTS.items()}


def published_name(name: str) -> str:
    """Of a DiT's tensor."""
    part, _, kind = name.rpartition(".")
    if part.startswith("layers."):
        _, index, inside = part.split(".", 2)
        return f"blocks.{index}.{_OF_LAYER[inside]}.{kind}"
    return f"{_STEM_AND_HEAD[part]}.{kind}"


def to_published(model: DiT) -> dict[str, Tensor]:
    """A DiT's tensors by their published names; of its own memory but where a shape differs."""
    config = model.config
    tensors = {published_name(name): tensor for name, tensor in model.state_dict().items()}
    patch = tensors["x_embedder.proj.weight"]
    image = patch.unflatten(1, (config.patch, config.patch, config.channels))
    tensors["x_embedder.proj.weight"] = image.permute(0, 3, 1, 2)
    positions = _positions(config, image.device).to(image.dtype)
    return {POSITIONS: positions[None], **tensors}


def _positions(config: DiTConfig, device: torch.device | str) -> Tensor:
    side = config.image_size // config.patch
    return grid_positions(side, config.dim, config.positions, device=device)


def config_of(
    tensors: Mapping[str, Tensor], where: Path, num_heads: int | None, image_size: int | None
) -> DiTConfig:
    """What the shapes of published tensors say; the number of heads stands in none of them.

    Raises:
        ValueError: a tensor that says a size is missing or of no such shape, or a size that no
            tensor says is not given.
    """
    sizes = ("D", "C", "patch", "patch")
    dim, channels, patch, _ = sizes_of(tensors, "x_embedder.proj.weight", where, *sizes)
    hidden, _ = sizes_of(tensors, "blocks.0.mlp.fc1.weight", where, "hidden", "D")
    rows, _ = sizes_of(tensors, "y_embedder.embedding_table.weight", where, "classes + 1", "D")
    depth = depth_of(tensors, "blocks")
    if hidden % dim:
        raise ValueError(
            f"blocks.0.mlp.fc1.weight of {where} must have a multiple of {dim} rows, got {hidden}"
        )
    if rows < 2:
        raise ValueError(
            f"y_embedder.embedding_table.weight of {where} must have a row for each class and one "
            f"for none, got {rows}"
        )
    if POSITIONS in tensors:
        _, count, _ = sizes_of(tensors, POSITIONS, where, "1", "T", "D")
        found = math.isqrt(count) * patch
        if image_size not in (None, found):
            raise ValueError(f"image_size must be {found} for {where}, got {image_size}")
        image_size = found
    if image_size is None:
        raise ValueError(f"image_size must be given for {where}, which has no {POSITIONS}")
    return DiTConfig(
        dim=dim,
        depth=depth,
        num_heads=_heads(dim, depth, where) if num_heads is None else num_heads,
        image_size=image_size,
        patch=patch,
        channels=channels,
        num_classes=rows - 1,
        mlp_ratio=hidden // dim,
        process="vp",
        prediction="epsilon",
    )


def _heads(dim: int, depth: int, where: Path) -> int:
    for config in PRESETS.values():
        if (config.dim, config.depth) == (dim, depth):
            return config.num_heads
    raise ValueError(
        f"num_heads must be given for {where}: no published DiT is {dim} wide and {depth} deep"
    )


def shapes_of(model: DiT, both: bool) -> dict[str, tuple[int, ...]]:
    """Of published tensors, with the rows of the variance or without."""
    shapes = {name: tuple(tensor.shape) for name, tensor in to_published(model).items()}
    for name in HEAD if both else ():
        rows, *others = shapes[name]
        shapes[name] = (2 * rows, *others)
    return shapes


def has_variance(tensors: Mapping[str, Tensor], config: DiTConfig) -> bool:
    """Whether the head predicts twice as many channels as the image has."""
    weight = tensors.get(HEAD[0])
    return weight is not None and len(weight) == 2 * config.channels * config.patch**2


def check_positions(found: Tensor | None, config: DiTConfig, where: Path) -> None:
    """Refuse positions that are not the published ones; a file may have none."""
    if found is None:
        return
    rounding = max(TOLERANCE, torch.finfo(found.dtype).eps)
    difference = float((found[0].float() - _positions(config, found.device)).abs().max())
    if not difference <= rounding:
        raise ValueError(
            f"{POSITIONS} of {where} must be the published sines and cosines, got others, which "
            f"differ by {difference:.1e}"
        )


def fill(model: DiT, tensors: Mapping[str, Tensor]) -> DiT:
    """Give a checked model its numbers, in memory of their own."""
    both, channels = has_variance(tensors, model.config), model.config.channels
    state = {}
    for name in model.state_dict():
        theirs = published_name(name)
        tensor = tensors[theirs]
        if theirs in HEAD and both:
            tensor = split_rows(tensor, channels)[0]
        if name == "patch.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        state[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    model.load_state_dict(state, assign=True)
    return model


def split_rows(tensor: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """The rows of the noise and those of the variance, of a head that predicts both."""
    of_noise, of_variance = tensor.unflatten(0, (-1, 2, channels)).unbind(1)
    return of_noise.flatten(0, 1), of_variance.flatten(0, 1)


def joined_rows(of_noise: Tensor, of_variance: Tensor, channels: int) -> Tensor:
    """The inverse of `split_rows`."""
    parts = [rows.unflatten(0, (-1, channels)) for rows in (of_noise, of_variance)]
    return torch.stack(parts, dim=1).flatten(0, 2)


def with_original(
    tensors: dict[str, Tensor], original: Mapping[str, Tensor], config: DiTConfig
) -> dict[str, Tensor]:
    """A model's published tensors, with the variance and the positions that an original has."""
    merged = dict(tensors)
    if POSITIONS in original:
        merged[POSITIONS] = original[POSITIONS]
    if has_variance(original, config):
        for name in HEAD:
            of_variance = split_rows(original[name], config.channels)[1].to(tensors[name])
            merged[name] = joined_rows(tensors[name], of_variance, config.channels)
    return merged
