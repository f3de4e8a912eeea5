"""How a checkpoint is read: not before it is proved to be what was written."""

import hashlib
import warnings
from pathlib import Path

import safetensors.torch
from torch import Tensor

from dbkernels.training.checkpoint.manifest import (
    FORMAT,
    STATE_FILE,
    file_name,
    group_of,
    read_manifest,
    refusal,
)
from dbkernels.training.checkpoint.part import Entry, boxes_of
from dbkernels.training.checkpoint.root import PUBLISHED, is_not_whole, newest_first, step_of
from dbkernels.training.checkpoint.shard import (
    Box,
    Shard,
    Tensors,
    check_shard,
    check_tiles,
    joined,
)
from dbkernels.training.tensor_file import DTYPES

READ_AGAIN = 20  # times, where a writer has moved what was to be read
_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


def _read_file(path: Path, name: str, expected: dict[str, int | str]) -> dict[str, Tensor]:
    # parse the bytes that were hashed: a second read could meet a file replaced meanwhile
    data = (path / name).read_bytes()
    found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for unit, got in found.items():
        if got != expected[unit]:
            raise refusal(path, name, f"{unit} {expected[unit]}", f"{got}")
    try:
        return dict(sorted(safetensors.torch.load(data).items()))
    except (safetensors.SafetensorError, KeyError) as error:
        raise refusal(path, name, "tensors that can be read", str(error)) from None


def _read(path: Path) -> tuple[Tensors, dict]:
    manifest = read_manifest(path)
    # a copy under a name of the caller's own is welcome, one under another step's name is not
    if PUBLISHED.fullmatch(path.name) and step_of(path) != manifest["step"]:
        raise refusal(path, STATE_FILE, f"step {step_of(path)}", f"step {manifest['step']}")
    files = manifest["files"]
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    for name in sorted(files.keys() - found):
        raise refusal(path, name, "a file", "none")
    for name in sorted(found - files.keys() - {STATE_FILE}):
        raise refusal(path, name, f"no file that {STATE_FILE} does not list", "one")
    if manifest["format"] == FORMAT:
        return {group_of(n): _read_file(path, n, e) for n, e in files.items()}, manifest["state"]
    return {g: _read_group(path, g, manifest) for g in _groups(files)}, manifest["state"]


def _groups(files: dict) -> list[str]:
    return list(dict.fromkeys(map(group_of, files)))


def _read_group(path: Path, group: str, manifest: dict) -> dict[str, Tensor]:
    """The whole tensors of a group, of the files of all ranks."""
    files, ranks = manifest["files"], manifest["ranks"]
    names = [file_name(group, rank, ranks) for rank in range(ranks)]
    held = [_read_file(path, n, files[n]) if n in files else {} for n in names]
    whole = {}
    # a tensor's parts are gone from memory before the next one is joined
    for name, entry in manifest["pieces"].get(group, {}).items():
        try:
            local = {rank: held[rank].pop(name, None) for rank in boxes_of(entry)}
            whole[name] = _joined(local, entry, f"{group}.{name}")
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"checkpoint {path}: {error}") from None
    for file, rest in zip(names[1:], held[1:], strict=True):
        for name in rest:
            raise refusal(path, file, f"no tensor that {STATE_FILE} does not list", name)
    for name in sorted(held[0].keys() & whole.keys()):
        raise refusal(path, names[0], f"no tensor that {STATE_FILE} does not list", name)
    return dict(sorted((held[0] | whole).items()))


def _joined(held: dict[int, Tensor | None], entry: Entry, name: str) -> Tensor:
    """The whole of what the ranks hold of a tensor."""
    shape, dtype = tuple(entry["shape"]), _DTYPES[entry["dtype"]]
    parts: list[tuple[Box, Tensor]] = []
    for rank, boxes in boxes_of(entry).items():
        local = held[rank]
        if local is None or local.dtype != dtype:
            got = "none" if local is None else str(local.dtype)
            raise ValueError(f"{name} must be {dtype} on rank {rank}, got {got}")
        check_shard(Shard(local, shape, boxes), name)
        parts += [(box, local) for box in boxes]
    check_tiles([box for box, _ in parts], shape, name)
    return joined(parts, shape, dtype)


def _intact_hint(path: Path) -> str:
    """What to load instead: the newest intact one before `path`, or else the newest after it."""
    if not PUBLISHED.fullmatch(path.name):
        return ""
    others = [p for p in newest_first(path.parent) if p.name != path.name]
    for other in sorted(others, key=lambda p: step_of(p) > step_of(path)):
        try:
            _read(other)
        except (ValueError, OSError):
            continue
        return f"; the previous checkpoint {other.name} is intact"
    return ""


def load(path: Path) -> tuple[Tensors, dict]:
    """Read one checkpoint after proving that it is what was saved.

    Args:
        path:  directory of the checkpoint
    Returns:
        (tensors, state) as given to `save`: CPU tensors, names in alphabetical order.
    Raises:
        ValueError: not a checkpoint, or a file is missing, unlisted or differs by as much as a bit.
    """
    try:
        return _read(path)
    except ValueError as error:
        raise ValueError(f"{error}{_intact_hint(path)}") from None


def load_latest(root: Path) -> tuple[Path, Tensors, dict]:
    """Read the newest checkpoint that is whole; a warning names each newer one that is damaged.

    A writer may save into the directory meanwhile: what it moved or removed is looked for again.

    Args:
        root:  directory of all checkpoints of one run; may be missing
    Returns:
        Its directory, and what `load` gives of it.
    Raises:
        ValueError: there is none, or all are damaged.
    """
    error: ValueError | OSError = ValueError(f"{root} must hold a checkpoint, got none")
    for again in reversed(range(READ_AGAIN)):
        listed = newest_first(root)
        for path in listed:
            found = _identity(path)
            try:
                return path, *_read(path)
            except (ValueError, OSError) as refused:
                if not is_not_whole(refused):
                    raise
                error = refused
                if again and (found is None or found != _identity(path)):
                    break
                warnings.warn(f"{refused}; it is passed over", stacklevel=2)
        else:
            # while one takes the place of another there may be none
            if listed:
                break
    raise error


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells a directory from another of the same name."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_ctime_ns
