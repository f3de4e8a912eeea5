"""The tensors of a DiT by the names of diffusers' DiTTransformer2DModel, and the published ones.

    transformer_blocks.0.attn1.to_q, to_k, to_v    blocks.0.attn.qkv, apart
    transformer_blocks.0.norm1.emb                 t_embedder and y_embedder, again in each layer
    the others                                     one of each, by `_NAMES`

Its code computes two things otherwise: `frequencies` is closed, and the norm before an MLP has the
eps that config.json says, 1e-5 where it says none.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from dbkernels.convert.dit_names import POSITIONS
from dbkernels.models.dit import DiTConfig
from dbkernels.settings import check_choice, check_number

CONFIG, WEIGHTS = "config.json", "diffusion_pytorch_model"
CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second in folders of 2022
EPS = 1e-6  # of every norm but those before an MLP
EMBEDDERS = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_OF_LAYER = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_NAMES = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
# of config.json: what it has where it does not say, which is all that a DiT has
_FIXED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "dropout": 0.0,
}
# number of diffusers' own defaults
_SIZES = {
    "num_attention_heads": 16,
    "attention_head_dim": 72,
    "in_channels": 4,
    "num_layers": 28,
    "sample_size": 32,
    "patch_size": 2,
    "num_embeds_ada_norm": 1000,
}


def config_of(settings: Mapping[str, object], where: Path) -> DiTConfig:
    """The configuration of the DiT that a folder's config.json says.

    Raises:
        ValueError: it says another class, or what no DiT here computes; with the setting's name.
    """
    check_choice(f"_class_name of {where}", settings.get("_class_name"), CLASSES)
    for name, value in _FIXED.items():
        if settings.get(name, value) != value:
            raise ValueError(f"{name} of {where} must be {value}, got {settings[name]}")
    sizes = {name: settings.get(name, default) for name, default in _SIZES.items()}
    for name, size in sizes.items():
        if type(size) is not int:
            raise ValueError(f"{name} of {where} must be a whole number, got {size!r}")
        check_number(f"{name} of {where}", size, 1)
    eps = settings.get("norm_eps", 1e-5)
    if not isinstance(eps, float) or not 0 < eps < 1:
        raise ValueError(f"norm_eps of {where} must be between 0 and 1, got {eps!r}")
    heads, channels = sizes["num_attention_heads"], sizes["in_channels"]
    if settings.get("out_channels") not in (None, channels, 2 * channels):
        raise ValueError(
            f"out_channels of {where} must be {channels}, or {2 * channels} with a variance, got "
            f"{settings['out_channels']}"
        )
    return DiTConfig(
        dim=heads * sizes["attention_head_dim"],
        depth=sizes["num_layers"],
        num_heads=heads,
        image_size=sizes["sample_size"],
        patch=sizes["patch_size"],
        channels=channels,
        num_classes=sizes["num_embeds_ada_norm"],
        process="vp",
        prediction="epsilon",
        frequencies="closed",
        eps2=None if eps == EPS else eps,
    )


def settings_of(config: DiTConfig, *, variance: bool) -> dict[str, object]:
    """The config.json from which diffusers makes the module."""
    return {
        "_class_name": CLASSES[0],
        "num_attention_heads": config.num_heads,
        "attention_head_dim": config.dim // config.num_heads,
        "in_channels": config.channels,
        "out_channels": config.channels * (2 if variance else 1),
        "num_layers": config.depth,
        "sample_size": config.image_size,
        "patch_size": config.patch,
        "num_embeds_ada_norm": config.num_classes,
        "norm_eps": EPS if config.eps2 is None else config.eps2,
        **_FIXED,
    }


def names_of(name: str, depth: int) -> list[str]:
    """Of diffusers' tensors for a published one: one, three parts, or a copy in each layer."""
    part, _, kind = name.rpartition(".")
    if part in EMBEDDERS:
        return [f"transformer_blocks.{i}.{EMBEDDERS[part]}.{kind}" for i in range(depth)]
    if part in _NAMES:
        return [f"{_NAMES[part]}.{kind}"]
    _, index, inside = part.split(".", 2)
    names = [f"attn1.to_{x}" for x in "qkv"] if inside == "attn.qkv" else [_OF_LAYER[inside]]
    return [f"transformer_blocks.{index}.{each}.{kind}" for each in names]


def to_diffusers(published: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """The published tensors by diffusers' names; it makes the positions anew."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in published.items():
        if name == POSITIONS:
            continue
        names = names_of(name, depth)
        parts = tensor.chunk(3) if ".attn.qkv." in name else [tensor] * len(names)
        tensors |= zip(names, parts, strict=True)
    return tensors


def shapes_of(published: Mapping[str, tuple[int, ...]], depth: int) -> dict[str, tuple[int, ...]]:
    """Of diffusers' tensors, from those of the published ones."""
    empty = {
        name: torch.empty(shape, dtype=torch.float32, device="meta")
        for name, shape in published.items()
    }
    return {name: tuple(each.shape) for name, each in to_diffusers(empty, depth).items()}


def from_diffusers(
    tensors: Mapping[str, Tensor], published: Iterable[str], depth: int, where: Path
) -> dict[str, Tensor]:
    """The published tensors of these names from diffusers', all of which are there.

    Raises:
        ValueError: the embedders of two layers differ, where a DiT has one of each.
    """
    joined = {}
    for name in published:
        first, *others = names_of(name, depth)
        if ".attn.qkv." in name:
            joined[name] = torch.cat([tensors[each] for each in (first, *others)])
            continue
        for other in others:
            if not torch.equal(tensors[first], tensors[other]):
                raise ValueError(
                    f"{other} of {where} must be equal to {first}, for a DiT has it once, got "
                    "other numbers"
                )
        joined[name] = tensors[first]
    return joined
