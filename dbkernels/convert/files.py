"""Tensors by name in other people's files, of which no code ever runs."""

import json
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from dbkernels.training.tensor_file import write_tensors
from dbkernels.whole_file import whole_file

PICKLED = (".pt", ".pth", ".bin")
# names under which a training script keeps its weights, the first of those that a file has
AVERAGED = ("ema", "state_dict_ema", "model_ema")
TRAINED = ("model", "state_dict")


def check_suffix(path: Path) -> None:
    """Refuse a file of a kind that is neither read nor written.

    Raises:
        ValueError: its suffix is another one.
    """
    if path.suffix not in (*PICKLED, ".safetensors"):
        raise ValueError(f"{path} must end in {', '.join(PICKLED)} or .safetensors")


def read_tensors(path: Path, *, ema: bool) -> dict[str, Tensor]:
    """Every tensor of a file.

    Args:
        path:  a safetensors file, or one of `torch.save`, which is read with weights_only
        ema:   whether the moving average of the weights is taken, where the file has both
    Returns:
        Tensors by name, on the CPU.
    Raises:
        ValueError: the file is missing or damaged, would have to be unpickled, or holds something
            else than tensors by name, all of one dtype.
    """
    check_suffix(path)
    if not path.is_file():
        raise ValueError(f"{path} must be a file, got none")
    found = _of_safetensors(path) if path.suffix == ".safetensors" else _of_torch(path)
    tensors = _weights(found, ema)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ValueError(
                f"{path} must hold tensors by name, got {name!r}, a {type(tensor).__name__}"
            )
    if not tensors:
        raise ValueError(f"{path} must hold tensors by name, got none")
    first = next(iter(tensors))
    for name, tensor in tensors.items():
        if tensor.dtype != tensors[first].dtype or not tensor.is_floating_point():
            raise ValueError(
                f"{name} of {path} must be of floating point, and {tensors[first].dtype} as "
                f"{first} is, got {tensor.dtype}"
            )
    return tensors


def _of_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path} must be a whole safetensors file, got {error}") from None


def _of_torch(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = str(error).split("Unsupported ")[-1].split("GLOBAL ")[-1].split(" was")[0]
        raise ValueError(
            f"{path} must hold tensors alone, for nothing is unpickled here, got {wanted:.200}"
        ) from None
    except (RuntimeError, OSError, EOFError, zipfile.BadZipFile, struct.error) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} must be a whole file of torch.save, got {reason}") from None


def _weights(found: object, ema: bool) -> Mapping[str, object]:
    """The part of a file that has the weights; a file of weights alone is that part."""
    if not isinstance(found, dict):
        return {"": found}
    for key in (*(AVERAGED if ema else ()), *TRAINED):
        if isinstance(found.get(key), dict):
            return found[key]
    return found


def check_names(
    found: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    where: Path,
    *,
    may_lack: tuple[str, ...] = (),
) -> None:
    """Refuse tensors that are not those of a model.

    Args:
        found:     by name, of a file
        expected:  shapes by name
        where:     the file, for the message
        may_lack:  names that a file need not have
    Raises:
        ValueError: with the first name that is missing, unknown or of another shape.
    """
    for name, shape in expected.items():
        if name not in found:
            if name in may_lack:
                continue
            raise ValueError(f"{name} of {where} must be {shape}, got no such tensor")
        if tuple(found[name].shape) != tuple(shape):
            got = tuple(found[name].shape)
            raise ValueError(f"{name} of {where} must be {tuple(shape)}, got {got}")
    for name, tensor in found.items():
        if name not in expected:
            got = f"one of {tuple(tensor.shape)}"
            raise ValueError(f"{name} of {where} must not be there, got {got}: no layer has it")


def sizes_of(found: Mapping[str, Tensor], name: str, where: Path, *axes: str) -> tuple[int, ...]:
    """Sizes of a tensor whose axes are known by name.

    Raises:
        ValueError: there is no such tensor, or it has another number of axes, or none of a size.
    """
    wanted = f"({', '.join(axes)})"
    if name not in found:
        raise ValueError(f"{name} of {where} must be {wanted}, got no such tensor")
    shape = tuple(found[name].shape)
    if len(shape) != len(axes) or 0 in shape:
        raise ValueError(f"{name} of {where} must be {wanted}, got {shape}")
    return shape


def depth_of(found: Mapping[str, Tensor], stack: str) -> int:
    """Layers that the names tell of, as `stack.0.`, `stack.1.`: up to the first gap, at least 1."""
    numbers = {name.split(".")[1] for name in found if name.startswith(f"{stack}.")}
    depth = 1
    while str(depth) in numbers:
        depth += 1
    return depth


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name, whole or not at all, as the file's suffix says."""
    plain = {name: tensor.detach() for name, tensor in tensors.items()}
    with whole_file(path) as file:
        if path.suffix == ".safetensors":
            write_tensors(file, plain)
        else:
            # a view would take all that it is a view of along
            torch.save({name: tensor.cpu().clone() for name, tensor in plain.items()}, file)


def read_settings(path: Path) -> dict[str, object]:
    """What a JSON file says by name.

    Raises:
        ValueError: it is missing, or something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be a file of JSON, got {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold settings by name, got a {type(found).__name__}")
    return found
