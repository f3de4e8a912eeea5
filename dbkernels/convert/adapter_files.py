"""Adapters in files that peft and diffusers load, of one block alone or of all.

    layout      path                                             keys
    peft        a folder: adapter_model.safetensors and          base_model.model.NAME.lora_A.weight
                adapter_config.json
    diffusers   a folder: pytorch_lora_weights.safetensors,      transformer.NAME.lora_A.weight
                whose metadata has rank and alpha

NAME is the module's in the code that the file is for, which `adapter_names` knows. A is lora_A and
B is lora_B, in the adapter's own dtype; the scale alpha / r is in neither.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import safetensors
import safetensors.torch
import torch
from torch import nn

from dbkernels.convert.adapter_names import Names, adapters_by_name, places_of, system_of
from dbkernels.convert.files import read_settings
from dbkernels.models.adapter import Numbers, put_adapters
from dbkernels.settings import check_choice
from dbkernels.whole_file import make_directory, whole_file, write_whole

AdapterLayout = Literal["peft", "diffusers"]
CONFIG, METADATA = "adapter_config.json", "lora_adapter_metadata"
FILES: dict[AdapterLayout, str] = {
    "peft": "adapter_model.safetensors",
    "diffusers": "pytorch_lora_weights.safetensors",
}
PREFIXES: dict[AdapterLayout, str] = {"peft": "base_model.model.", "diffusers": "transformer."}
_SETTINGS = ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern")
# settings of peft that would change what A and B mean: what each must be
_FIXED = {
    "peft_type": "LORA", "bias": "none", "use_dora": False, "use_rslora": False,
    "fan_in_fan_out": False, "modules_to_save": None, "lora_bias": False,
}  # fmt: skip


class AdapterFile(NamedTuple):
    """What a file holds."""

    layout: AdapterLayout
    numbers: dict[str, Numbers]
    """By the module's name in the original code."""
    base: str
    """The network that they were trained on, as whoever saved them named it; may be empty."""


def save_adapters(
    model: nn.Module,
    path: str | Path,
    layout: AdapterLayout,
    *,
    names: Names | None = None,
    layers: Sequence[int] | None = None,
    base: str = "",
) -> None:
    """Write a model's adapters.

    Where the code has q, k and v in one projection, their adapters become one of three times the
    rank, which adds the same: A of the three one below another, and B along the diagonal.

    Args:
        model:   a family, or its `DiffusionBlocks`
        path:    a folder; a file of the same layout in it is replaced, whole or not at all
        layout:  peft or diffusers
        names:   whose modules' names: "diffusers" or "dit" for a DiT, "own" for any family; None is
                 diffusers for a DiT, else own
        layers:  numbers of the layers that are saved, as a `Block` has them; None is all
        base:    what peft shall load them on: a path or a name
    Raises:
        ValueError: the model has no adapters, or none in these layers, or there are no such names.
    """
    check_choice("layout", layout, get_args(AdapterLayout))
    numbers = adapters_by_name(model, names, layers)
    _write(AdapterFile(layout, numbers, base), Path(path))


def load_adapters(model: nn.Module, path: str | Path) -> None:
    """Give a model the adapters of a file, frozen as `add_adapters` leaves it.

    Args:
        model:  a family without adapters, or its `DiffusionBlocks`
        path:   as `save_adapters` has it, also of peft's or diffusers' own making
    Raises:
        ValueError: the file is missing or damaged, has something else than A and B, or a module or
            a shape that the model has not. The model is as it was then.
    """
    found = read_adapters(path)
    put_adapters(model, places_of(model, found.numbers, Path(path)))


def merge_adapter_files(paths: Sequence[str | Path], path: str | Path) -> None:
    """Write the adapters of several files, of other layers or targets each, as one.

    Ranks and alphas may differ.

    Args:
        paths:  of files of one layout, for one code's names and one base
        path:   of the file that is written, of the same layout
    Raises:
        ValueError: there is none, two have an adapter of one module, or they disagree in layout,
            names or base. Nothing is written then.
    """
    if not paths:
        raise ValueError("paths must be at least one file of adapters, got none")
    files = {Path(each): read_adapters(each) for each in paths}
    if len(files) < len(paths):
        raise ValueError(f"paths must name each file once, got {', '.join(map(str, paths))}")
    (first, whole), *others = files.items()
    for where, other in others:
        for what, ours, theirs in (
            ("layout", whole.layout, other.layout),
            ("base", whole.base, other.base),
            ("names", system_of(whole.numbers, first), system_of(other.numbers, where)),
        ):
            if ours != theirs:
                raise ValueError(f"{what} of {where} must be {ours} as of {first}, got {theirs}")
        if both := sorted(whole.numbers.keys() & other.numbers.keys()):
            raise ValueError(f"{where} must have no adapter of {both[0]}, which {first} has too")
        whole = whole._replace(numbers=whole.numbers | other.numbers)
    _write(whole, Path(path))


def read_adapters(path: str | Path) -> AdapterFile:
    """What a folder, or the file in it, holds.

    Raises:
        ValueError: as `load_adapters`, but for what the model is asked.
    """
    folder = Path(path)
    if folder.suffix == ".safetensors":
        folder = folder.parent
    layouts = [layout for layout, name in FILES.items() if (folder / name).is_file()]
    if len(layouts) != 1:
        wanted, got = " or ".join(FILES.values()), "both" if layouts else "none"
        raise ValueError(f"{folder} must have one of {wanted}, got {got}")
    layout, file = layouts[0], folder / FILES[layouts[0]]
    try:
        tensors = safetensors.torch.load_file(file)
        with safetensors.safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file} must be a whole safetensors file, got {error}") from None
    of_peft = layout == "peft"
    settings = read_settings(folder / CONFIG) if of_peft else _of_metadata(metadata, file)
    return AdapterFile(layout, *_numbers(tensors, settings, PREFIXES[layout], file))


def _of_metadata(metadata: Mapping[str, str], file: Path) -> dict[str, object]:
    """Those settings that diffusers keeps in the file; none where it was told of none."""
    try:
        found = json.loads(metadata.get(METADATA, "{}"))
    except ValueError as error:
        raise ValueError(f"{METADATA} of {file} must be JSON, got {error}") from None
    prefix = PREFIXES["diffusers"]
    return {key.removeprefix(prefix): v for key, v in found.items() if key.startswith(prefix)}


def _numbers(
    tensors: Mapping[str, object], settings: Mapping[str, object], prefix: str, file: Path
) -> tuple[dict[str, Numbers], str]:
    for name, value in _FIXED.items():
        if settings.get(name, value) not in (value, [] if value is None else value):
            raise ValueError(f"{name} of {file} must be {value}, got {settings[name]}")
    pairs: dict[str, dict[str, object]] = {}
    for key, tensor in tensors.items():
        match = re.fullmatch(re.escape(prefix) + r"(.+)\.lora_([AB])\.weight", key)
        if match is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise ValueError(f"{key} of {file} must be {prefix}NAME.lora_A.weight or lora_B, a map")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    numbers = {}
    for name, pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise ValueError(f"{name} of {file} must have lora_A and lora_B, got one of them")
        # without a word of it, both libraries add B A as it is
        alpha = settings.get("lora_alpha", len(pair["A"]))
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
        numbers[name] = Numbers(pair["A"], pair["B"], float(alpha))
    if not numbers:
        raise ValueError(f"{file} must have adapters, got none")
    return numbers, str(settings.get("base_model_name_or_path") or "")


def _write(file: AdapterFile, folder: Path) -> None:
    prefix, settings = PREFIXES[file.layout], _settings(file)
    tensors, metadata = {}, {"format": "pt"}
    for name, numbers in file.numbers.items():
        for kind, tensor in (("A", numbers.down), ("B", numbers.up)):
            # the format has no tensors that share memory, as A of q, k and v does
            own = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
            tensors[f"{prefix}{name}.lora_{kind}.weight"] = own
    if file.layout == "diffusers":
        packed = {f"{prefix}{key}": value for key, value in settings.items()}
        metadata[METADATA] = json.dumps(packed, indent=2, sort_keys=True)
    make_directory(folder)
    with whole_file(folder / FILES[file.layout]) as opened:
        opened.write(safetensors.torch.save(tensors, metadata))
    if file.layout == "peft":
        write_whole(folder / CONFIG, f"{json.dumps(settings, indent=2, sort_keys=True)}\n")


def _settings(file: AdapterFile) -> dict[str, object]:
    """What peft makes its configuration of: the commonest rank and alpha, and the others."""
    ranks = {name: len(numbers.down) for name, numbers in file.numbers.items()}
    alphas = {name: numbers.alpha for name, numbers in file.numbers.items()}
    (rank, _), (alpha, _) = (Counter(each.values()).most_common(1)[0] for each in (ranks, alphas))
    return {
        **_FIXED,
        "base_model_name_or_path": file.base or None,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "target_modules": sorted(ranks),
        "rank_pattern": {f"^{re.escape(n)}": r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
    }
