"""The tensors of a timm ViT, and a `ViT` of them that answers as it does.

    patch_embed.proj                  patch, whose weight has an image's axes (D, C, p, p)
    cls_token + pos_embed[:, 0]       positions[0], where z = 0 leaves nothing else
    pos_embed[:, 1:]                  positions[1:]
    blocks.0, blocks.1, ...           layers.0, layers.1, ...: `dit_block` has their parts
    blocks.0.ls1, blocks.0.ls2        the gates of layers.0, which are 1 where there are none
    norm, head                        norm, head

Dosovitskiy et al. 2020 (arXiv:2010.11929), and timm's VisionTransformer with a class token. Its
layers have no condition. So the modulation's weight is zero here, and its bias is the gates: the
noise has no effect, until training gives it one. Of z = 0 at a level s the head reads, for a clean
sample of deviation sd, sd s / sqrt(s**2 + sd**2) times the norm's result, and `modulation` has a
scale of 1 / sd over it: what is left is sd**2 / (2 s**2), 2e-5 at a level of 80 and sd = 0.5. The
embedding of a label begins as the label's row of the head.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbkernels.convert.dit_block import PARTS
from dbkernels.convert.files import depth_of, sizes_of
from dbkernels.models.embed import NoiseEmbedding
from dbkernels.models.vit import ViT, ViTConfig

# heads of the published sizes, by width and depth: tiny, small, base, large, huge
HEADS = {(192, 12): 3, (384, 12): 6, (768, 12): 12, (1024, 24): 16, (1280, 32): 16}
FIRST = ("cls_token", "pos_embed")
SCALES = ("ls1.gamma", "ls2.gamma")
_STEM_AND_HEAD = {"patch": "patch_embed.proj", "norm": "norm", "head": "head"}
_OF_LAYER = {ours: theirs for theirs, ours in PARTS.items() if ours != "modulation"}


def _name(name: str) -> str | None:
    """timm's, of a ViT's tensor; None where it is of the noise, of labels, or several."""
    part, _, kind = name.rpartition(".")
    if part.startswith("layers."):
        _, index, inside = part.split(".", 2)
        return f"blocks.{index}.{_OF_LAYER[inside]}.{kind}" if inside in _OF_LAYER else None
    return f"{_STEM_AND_HEAD[part]}.{kind}" if part in _STEM_AND_HEAD else None


def config_of(
    tensors: Mapping[str, Tensor], where: Path, num_heads: int | None, image_size: int | None
) -> ViTConfig:
    """What the shapes of timm's tensors say; the number of heads stands in none of them.

    Raises:
        ValueError: a tensor that says a size is missing or of no such shape, or a size that no
            tensor says is not given.
    """
    sizes = ("D", "C", "patch", "patch")
    dim, channels, patch, _ = sizes_of(tensors, "patch_embed.proj.weight", where, *sizes)
    hidden, _ = sizes_of(tensors, "blocks.0.mlp.fc1.weight", where, "hidden", "D")
    classes, _ = sizes_of(tensors, "head.weight", where, "classes", "D")
    _, tokens, _ = sizes_of(tensors, "pos_embed", where, "1", "T + 1", "D")
    found = math.isqrt(tokens - 1) * patch
    if image_size not in (None, found):
        raise ValueError(f"image_size must be {found} for {where}, got {image_size}")
    depth = depth_of(tensors, "blocks")
    heads = HEADS.get((dim, depth)) if num_heads is None else num_heads
    if heads is None:
        raise ValueError(
            f"num_heads must be given for {where}: no published ViT is {dim} wide and {depth} deep"
        )
    return ViTConfig(
        dim=dim,
        depth=depth,
        num_heads=heads,
        image_size=found,
        patch=patch,
        channels=channels,
        num_classes=classes,
        mlp_hidden=hidden,
        cond_dim=max(dim // 6, 1),
        mlp="gelu_exact",
    )


def has_scales(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the layers scale their branches."""
    return any(name.endswith(SCALES) for name in tensors)


def shapes_of(model: ViT, scales: bool) -> dict[str, tuple[int, ...]]:
    """Of timm's tensors."""
    return {name: tuple(tensor.shape) for name, tensor in _to_timm(model, scales).items()}


def fill(model: ViT, tensors: Mapping[str, Tensor]) -> ViT:
    """Give a model without numbers those of tensors that are all there, in memory of their own.

    torch's own generator draws the embedding of the noise, which has no effect yet.
    """
    like = tensors["head.weight"]
    state = {"label_table.weight": like.clone()}
    noise = NoiseEmbedding(model.config.cond_dim).to(like.dtype)
    state |= {f"condition.{name}": tensor for name, tensor in noise.state_dict().items()}
    positions = tensors["pos_embed"][0].clone()
    positions[0] += tensors["cls_token"][0, 0]
    state["positions"] = positions
    for name, parameter in model.state_dict().items():
        theirs = _name(name)
        if theirs is None:
            state.setdefault(name, torch.zeros(parameter.shape, dtype=like.dtype))
            continue
        tensor = tensors[theirs]
        if name == "patch.weight":
            tensor = tensor.permute(0, 2, 3, 1).flatten(1)
        state[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    _of_scale(state["modulation.linear.bias"]).fill_(1 / model.sigma_data - 1)
    for index in range(model.config.depth):
        for gate, scale in zip(_gates(state, index), SCALES, strict=True):
            gate.copy_(tensors.get(f"blocks.{index}.{scale}", torch.ones_like(gate)))
    model.load_state_dict(state, assign=True)
    return model


def _gates(state: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor]:
    """Of the attention and of the MLP, in the bias of a layer's modulation."""
    parts = state[f"layers.{index}.modulation.bias"].chunk(6)
    return parts[2], parts[5]


def _of_scale(bias: Tensor) -> Tensor:
    """The scale's half of the last modulation's bias, shift and scale."""
    return bias.chunk(2)[1]


def to_timm(model: ViT, original: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """A ViT's tensors by timm's names.

    Args:
        model:     of `fill`, in which no noise has an effect
        original:  tensors that it was made of, or None. Its class token and that token's position,
                   of which the model has the sum, are written again where their sum is the same;
                   else the class token is the sum and its position zero.
    Raises:
        ValueError: the condition has an effect, which no ViT of timm can have.
    """
    state, config = model.state_dict(), model.config
    for index in range(config.depth):
        _check_unconditioned(state, f"layers.{index}.modulation", (0, 1, 3, 4))
    _check_unconditioned(state, "modulation.linear", (0,))
    bias = _of_scale(state["modulation.linear.bias"])
    if not bool((bias == 1 / config.sigma_data - 1).all()):
        raise ValueError(
            "modulation.linear.bias must have a scale of 1 / sigma_data - 1 for timm, whose ViT "
            "has no modulation, got others"
        )
    gates = [gate for index in range(config.depth) for gate in _gates(state, index)]
    scales = any(bool((gate != 1).any()) for gate in gates)
    tensors = _to_timm(model, scales or (original is not None and has_scales(original)))
    if original is None:
        return tensors
    token, first = original["cls_token"], original["pos_embed"][:, :1]
    if torch.equal((token + first)[0, 0], state["positions"][0].cpu()):
        others = state["positions"][None, 1:]
        tensors |= {"cls_token": token, "pos_embed": torch.cat([first.to(others), others], dim=1)}
    return tensors


def _check_unconditioned(state: Mapping[str, Tensor], name: str, zero: tuple[int, ...]) -> None:
    """Whether a modulation reads nothing of its condition, and adds nothing of its own."""
    weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
    parts = bias.chunk(2 if name == "modulation.linear" else 6)
    tested = {"weight": weight} | {f"bias, part {index}": parts[index] for index in zero}
    for part, tensor in tested.items():
        if tensor.count_nonzero():
            raise ValueError(
                f"{name}.{part} must be zero for timm, whose ViT has no condition, got numbers up "
                f"to {float(tensor.abs().max()):.1e}"
            )


def _to_timm(model: ViT, scales: bool) -> dict[str, Tensor]:
    state, config = model.state_dict(), model.config
    positions = state["positions"][None]
    token, others = positions[:, :1], positions[:, 1:]
    tensors = {"cls_token": token, "pos_embed": torch.cat([token * 0, others], dim=1)}
    tensors |= {theirs: tensor for name, tensor in state.items() if (theirs := _name(name))}
    patch = tensors["patch_embed.proj.weight"]
    image = patch.unflatten(1, (config.patch, config.patch, config.channels))
    tensors["patch_embed.proj.weight"] = image.permute(0, 3, 1, 2)
    for index in range(config.depth if scales else 0):
        of_both = zip(SCALES, _gates(state, index), strict=True)
        tensors |= {f"blocks.{index}.{scale}": gate for scale, gate in of_both}
    return tensors
