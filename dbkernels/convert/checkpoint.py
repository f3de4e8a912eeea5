"""Whole networks from other people's files, and back.

    layout      path                                       whose code loads it
    dit         DiT-XL-2-256x256.pt, or .safetensors       facebookresearch/DiT
    diffusers   a folder, its weights in transformer/      diffusers, DiTTransformer2DModel
    timm        .safetensors, .pth, .pt or .bin            timm, VisionTransformer

None of the three turns queries and keys by rotary positions, so their rows stay in their order.
"""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from dbkernels.convert import diffusers_names, dit_names, timm_names
from dbkernels.convert.files import (
    check_names,
    check_suffix,
    read_settings,
    read_tensors,
    write_file,
)
from dbkernels.convert.held import Layout, check_held
from dbkernels.models.dit import DiT, DiTConfig
from dbkernels.models.vit import ViT, ViTConfig
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.settings import check_choice, check_number
from dbkernels.whole_file import make_directory, write_whole

Read = tuple[DiTConfig | ViTConfig, dict[str, Tensor], Path]
# a tensor that tells the layout
_FIRST = {
    "x_embedder.proj.weight": "dit",
    "patch_embed.proj.weight": "timm",
    "pos_embed.proj.weight": "diffusers",
}


def load(
    path: str | Path,
    *,
    ema: bool = True,
    num_heads: int | None = None,
    image_size: int | None = None,
    recompute: Recompute = "none",
) -> DiT | ViT:
    """A family's network with the weights of somebody else's file.

    Every name, shape and dtype is checked before a model is made. No code of a file runs. Where a
    DiT predicts a variance too, a warning says that it is left out.

    Args:
        path:        a DiT or a timm ViT, .safetensors or of `torch.save`; or a folder of diffusers,
                     the pipeline's or its transformer's
        ema:         whether the moving average of the weights is taken, where a file has it beside
                     the weights
        num_heads:   of the attention, where the file is of no published size
        image_size:  pixels, or cells of a latent, where the file has no positions
        recompute:   what the backward computes again: a key of `dbkernels.ops.POLICIES`
    Returns:
        A model on the CPU, in the file's dtype and memory of its own. The level of a DiT is the
        step that it was trained with, and it predicts the noise (`process="vp"`,
        `prediction="epsilon"`). A ViT answers as timm's from z = 0 at the greatest level.
    Raises:
        ValueError: a tensor is missing, unknown or of another shape or dtype; the file is damaged
            or needs unpickling; or it does not say a size that is not given. It names the tensor.
    """
    for name, value in {"num_heads": num_heads, "image_size": image_size}.items():
        if value is not None:
            check_number(name, value, 1)
    config, tensors, where = _read(Path(path), ema, num_heads, image_size)
    with torch.device("meta"):
        model = _family(config)(replace(config, recompute=recompute))
    if isinstance(model, ViT):
        return timm_names.fill(model, tensors)
    if dit_names.has_variance(tensors, config):
        warnings.warn(
            f"{where} predicts a variance beside the noise, for which a DiT here has no use: it is "
            "left out, and save_as(..., original=...) writes it back",
            stacklevel=2,
        )
    return dit_names.fill(model, tensors)


def _family(config: DiTConfig | ViTConfig) -> type[DiT] | type[ViT]:
    return DiT if isinstance(config, DiTConfig) else ViT


def _read(path: Path, ema: bool, num_heads: int | None, image_size: int | None) -> Read:
    """What a file or a folder holds, all of it checked; a DiT's by the published names."""
    if path.is_dir():
        for name, value in {"num_heads": num_heads, "image_size": image_size}.items():
            if value is not None:
                raise ValueError(
                    f"{name} must be None for {path}, whose config.json says it, got {value}"
                )
        return _read_folder(path, ema)
    tensors = read_tensors(path, ema=ema)
    names = {"dit": dit_names, "timm": timm_names}[_layout_of(tensors, path)]
    config = names.config_of(tensors, path, num_heads, image_size)
    _check(config, tensors, path)
    return config, tensors, path


def _check(config: DiTConfig | ViTConfig, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Refuse tensors that are not those of a network of the configuration."""
    with torch.device("meta"):
        model = _family(config)(config)
    if isinstance(model, ViT):
        shapes = timm_names.shapes_of(model, timm_names.has_scales(tensors))
        return check_names(tensors, shapes, where)
    shapes = dit_names.shapes_of(model, dit_names.has_variance(tensors, config))
    check_names(tensors, shapes, where, may_lack=(dit_names.POSITIONS,))
    dit_names.check_positions(tensors.get(dit_names.POSITIONS), config, where)


def _layout_of(tensors: Mapping[str, Tensor], path: Path) -> Layout:
    layouts = [layout for name, layout in _FIRST.items() if name in tensors]
    if layouts == ["diffusers"]:
        raise ValueError(
            f"{path} must be given as the folder that it lies in, whose config.json says the rest"
        )
    if len(layouts) != 1:
        names = ", ".join(list(tensors)[:3])
        raise ValueError(
            f"{path} must have the tensors of one DiT or ViT, with one of {', '.join(_FIRST)}, got "
            f"{names} and others"
        )
    return layouts[0]


def _read_folder(path: Path, ema: bool) -> Read:
    inside = path / "transformer"
    path = inside if inside.is_dir() else path
    said = path / diffusers_names.CONFIG
    config = diffusers_names.config_of(read_settings(said), said)
    files = [path / f"{diffusers_names.WEIGHTS}{suffix}" for suffix in (".safetensors", ".bin")]
    file = next((each for each in files if each.is_file()), files[0])
    tensors = read_tensors(file, ema=ema)
    with torch.device("meta"):
        model = DiT(config)
    bias = tensors.get("proj_out_2.bias")
    both = bias is not None and len(bias) == 2 * config.channels * config.patch**2
    expected = diffusers_names.shapes_of(dit_names.shapes_of(model, both), config.depth)
    check_names(tensors, expected, file)
    published = map(dit_names.published_name, model.state_dict())
    return config, diffusers_names.from_diffusers(tensors, published, config.depth, file), file


def save_as(
    model: DiT | ViT,
    path: str | Path,
    layout: Layout,
    *,
    original: str | Path | None = None,
    ema: bool = True,
) -> None:
    """Write a network as a file, or a folder, that other people's code loads.

    Without an original a DiT is written as one that predicts no variance (`learn_sigma=False`), and
    with positions made anew. With it, what the model has no place for is written as it was there;
    where nothing was trained, every tensor has the original's bits. A warning says what the other
    code computes otherwise.

    Args:
        model:     as `load` gives it, trained or not
        path:      a file, or for diffusers a folder, in which transformer/ gets config.json and the
                   weights. Each file is written whole or not at all, and replaces an older one.
        layout:    whose code loads it
        original:  the path that `load` read the model from, of any layout: for a DiT its variance
                   and positions; for a ViT its class token and that token's position, of which a
                   model has the sum
        ema:       of the original, as that of `load`
    Raises:
        ValueError: the layout has no such network, with what is other; its files have another
            suffix; or, of the original, as `load`.
    """
    path = Path(path)
    check_choice("layout", layout, get_args(Layout))
    family = ViT if layout == "timm" else DiT
    if not isinstance(model, family):
        raise ValueError(
            f"model must be a {family.__name__} for {layout}, got a {type(model).__name__}"
        )
    if layout != "diffusers":
        check_suffix(path)
    check_held(model.config, layout)
    there = None if original is None else _original(model, Path(original), ema)
    if layout == "timm":
        return write_file(path, timm_names.to_timm(model, there))
    tensors = dit_names.to_published(model)
    if there is not None:
        tensors = dit_names.with_original(tensors, there, model.config)
    if layout == "dit":
        return write_file(path, tensors)
    return _write_folder(model.config, tensors, path / "transformer")


def _original(model: DiT | ViT, path: Path, ema: bool) -> Mapping[str, Tensor]:
    """The tensors that a model was made of, or those of another one of its sizes."""
    sizes = None if path.is_dir() else (model.config.num_heads, model.config.image_size)
    config, tensors, where = _read(path, ema, *(sizes or (None, None)))
    if _family(config) is not type(model):
        raise ValueError(f"{where} must hold a {type(model).__name__}, as the model is, got none")
    _check(model.config, tensors, where)
    return tensors


def _write_folder(config: DiTConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    variance = dit_names.has_variance(tensors, config)
    settings = diffusers_names.settings_of(config, variance=variance)
    make_directory(folder)
    weights = diffusers_names.to_diffusers(tensors, config.depth)
    write_file(folder / f"{diffusers_names.WEIGHTS}.safetensors", weights)
    write_whole(folder / diffusers_names.CONFIG, f"{json.dumps(settings, indent=2)}\n")
