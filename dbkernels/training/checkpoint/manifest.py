"""state.json: what a checkpoint is of, its files and their hashes, and where pieces lie."""

import hashlib
import json
import math
import re
from pathlib import Path

from dbkernels.training.checkpoint.part import Pieces
from dbkernels.training.tensor_file import DTYPES

Files = dict[str, dict[str, int | str]]  # name -> bytes and sha256

FORMAT = 1  # of one process
FORMAT_OF_SHARDS = 2  # of several
STATE_FILE = "state.json"
SUFFIX = ".safetensors"
_FILE = re.compile(rf"[A-Za-z0-9_-]+(\.[0-9]+of[0-9]+)?{SUFFIX}")


def as_json(value: object) -> bytes:
    """The same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def check_state(value: object, where: str) -> None:
    """Refuse what JSON would not give back, with where it is."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the keys of {where} must be strings, got {key!r}")
            check_state(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            check_state(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{where} must be a value that JSON has, got {type(value).__name__}")


def file_name(group: str, rank: int, ranks: int) -> str:
    """The name of the file that a rank writes of a group of tensors."""
    return f"{group}.{rank}of{ranks}{SUFFIX}" if ranks > 1 else f"{group}{SUFFIX}"


def group_of(name: str) -> str:
    """The group of tensors that a file has, by its name."""
    return name.partition(".")[0]


def manifest_bytes(step: int, state: dict, files: Files, ranks: int, where: Pieces) -> bytes:
    """What state.json has."""
    manifest = {"format": FORMAT, "step": step, "state": state, "files": files}
    if ranks > 1:
        manifest |= {"format": FORMAT_OF_SHARDS, "ranks": ranks, "pieces": where}
    manifest["self"] = hashlib.sha256(as_json(manifest)).hexdigest()
    return as_json(manifest)


def refusal(path: Path, name: str, expected: str, got: str) -> ValueError:
    """An error of a file of a checkpoint that is not what it must be."""
    return ValueError(f"checkpoint {path}: {name}: expected {expected}, got {got}")


def read_manifest(path: Path) -> dict:
    """What state.json of a checkpoint has, of the types that `save` writes.

    Raises:
        ValueError: there is none, or it is not what was written.
    """
    if not (path / STATE_FILE).is_file():
        got = "a directory without it" if path.is_dir() else "no directory"
        raise ValueError(f"{path} is not a checkpoint: expected {STATE_FILE} in it, got {got}")
    raw = (path / STATE_FILE).read_bytes()
    try:
        manifest = dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as error:
        raise refusal(path, STATE_FILE, "a JSON object", str(error)) from None
    if (found := manifest.get("format")) not in (FORMAT, FORMAT_OF_SHARDS):
        known = f"format {FORMAT} or {FORMAT_OF_SHARDS}"
        raise refusal(path, STATE_FILE, known, f"format {found}")
    # hash the bytes, not the values: 1e-05 and 1E-05 are one bit apart and the same number
    body = raw.replace(f'"self":"{manifest.get("self")}",'.encode(), b"", 1)
    if (digest := hashlib.sha256(body).hexdigest()) != manifest.get("self"):
        raise refusal(path, STATE_FILE, f"sha256 {manifest.get('self')}", digest)
    if (wrong := _wrong_type(manifest)) is not None:
        raise refusal(path, STATE_FILE, f"{wrong} as `save` writes it", "another")
    return manifest


def _wrong_type(manifest: dict) -> str | None:
    """What of a manifest is not of the type that it is written with."""
    files = manifest.get("files")
    if not _is_count(manifest.get("step")):
        return "step"
    if not isinstance(manifest.get("state"), dict):
        return "state"
    kinds = {"bytes": int, "sha256": str}
    if not isinstance(files, dict) or not all(
        _FILE.fullmatch(name)
        and isinstance(entry, dict)
        and {key: type(value) for key, value in entry.items()} == kinds
        for name, entry in files.items()
    ):
        return "files"
    if manifest["format"] == FORMAT_OF_SHARDS:
        return _wrong_shards(manifest, files)
    return "files" if any(name.count(".") > 1 for name in files) else None


def _wrong_shards(manifest: dict, files: Files) -> str | None:
    ranks, where = manifest.get("ranks", 0), manifest.get("pieces")
    if not _is_count(ranks) or ranks < 2:
        return "ranks"
    groups = {group_of(name) for name in files}
    if not isinstance(where, dict) or not where.keys() <= groups:
        return "pieces"
    for named in where.values():
        if not isinstance(named, dict) or not all(_is_entry(e, ranks) for e in named.values()):
            return "pieces"
    return None


def _is_entry(entry: object, ranks: int) -> bool:
    """Whether this is what `part` says of a tensor."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "boxes"}:
        return False
    shape, boxes = entry["shape"], entry["boxes"]
    return (
        entry["dtype"] in DTYPES.values()
        and _are_counts(shape)
        and isinstance(boxes, list)
        and all(_is_box(box, shape, ranks) for box in boxes)
    )


def _is_box(box: object, shape: list[int], ranks: int) -> bool:
    if not isinstance(box, list) or len(box) != 4:
        return False
    rank, row, at, size = box
    return (
        _are_counts([rank, row])
        and rank < ranks
        and _are_counts(at)
        and _are_counts(size)
        and len(at) == len(size) == len(shape) > 0
        and all(a + n <= whole for a, n, whole in zip(at, size, shape, strict=True))
    )


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _are_counts(values: object) -> bool:
    return isinstance(values, list) and all(map(_is_count, values))
