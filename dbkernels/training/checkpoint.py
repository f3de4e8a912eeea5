"""Checkpoints that come back exactly as they were saved, or are refused.

    root/step-00000123/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

A save writes a hidden sibling directory, makes it durable and publishes it with one rename.
state.json has the size and sha256 of every file, and its own sha256. Nothing is ever unpickled.
One process saves into a root at a time; any number may read it.
"""

import hashlib
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dbkernels.settings import check_number
from dbkernels.whole_file import make_durable

Tensors = dict[str, dict[str, Tensor]]  # group ("model", "ema", ...) -> tensor name -> tensor

FORMAT = 1
STATE_FILE = "state.json"
SUFFIX = ".safetensors"
MAX_DIFFERENCES = 5  # more make an error message that nobody reads
# safetensors also writes dtypes that it cannot read back
DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip

# .replaced is a complete checkpoint that counts until the new save of its step is in place
_PUBLISHED = re.compile(r"step-([0-9]{8,})(?:\.replaced)?")
_TEMPORARY = re.compile(r"\.step-[0-9]{8,}(?:\.replaced)?-([0-9]{1,7})")


def _json(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _step(path: Path) -> int:
    return int(_PUBLISHED.fullmatch(path.name)[1])


def _newest_first(root: Path) -> list[Path]:
    complete = [file.parent for file in root.glob(f"step-*/{STATE_FILE}")]
    paths = [p for p in complete if _PUBLISHED.fullmatch(p.name)]
    return sorted(paths, key=lambda p: (_step(p), p.suffix == ""), reverse=True)


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name}-{os.getpid()}")


def _discard(path: Path) -> None:
    if path.is_symlink():
        return path.unlink()
    # hidden first: a removal that is cut short must not leave half a checkpoint under a good name
    os.rename(path, _hidden(path))
    shutil.rmtree(_hidden(path))


def _tidy(root: Path) -> None:
    """Finish what a save that was cut short has left."""
    others = {p.name for p in Path("/proc").iterdir()} - {str(os.getpid())}
    for path in list(root.iterdir()):
        temporary = _TEMPORARY.fullmatch(path.name)
        # our own pid too: in a container that restarts, the run that died often had it
        if temporary and temporary[1] not in others:
            shutil.rmtree(path)
        elif _PUBLISHED.fullmatch(path.name) and path.suffix:
            final = path.with_suffix("")
            if final.exists():
                _discard(path)
            else:
                os.rename(path, final)


def _check_state(value: object, where: str) -> None:
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"the keys of {where} must be strings, got {key!r}")
            _check_state(item, f"{where}.{key}")
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be a finite number, got {value}")
    elif not (value is None or isinstance(value, str | int | float)):
        raise ValueError(f"{where} must be a value that JSON has, got {type(value).__name__}")


def _check_request(step: int, tensors: Tensors, state: dict, keep: int) -> None:
    check_number("keep", keep, 1)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    if not isinstance(state, dict):
        raise ValueError(f"state must be a dict, got {type(state).__name__}")
    _check_state(state, "state")
    for group, named in tensors.items():
        if not re.fullmatch("[A-Za-z0-9_-]+", group):
            raise ValueError(f"a group is named by letters, digits, _ and -, got {group!r}")
        if "__metadata__" in named:
            raise ValueError(f"{group} has a tensor named __metadata__, which the format reserves")
        for name, t in named.items():
            if not isinstance(t, Tensor):
                raise ValueError(f"{group}.{name} must be a tensor, got {type(t).__name__}")
            if t.layout != torch.strided or t.is_meta or t.dtype not in DTYPES:
                got = f"{t.dtype}, {t.layout}, {t.device}"
                raise ValueError(f"{group}.{name} must be dense with a dtype of DTYPES, got {got}")


def _bytes_and_sha256(data: bytes) -> dict[str, int | str]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write(directory: Path, step: int, tensors: Tensors, state: dict) -> None:
    directory.mkdir()
    files = {}
    for group, named in tensors.items():
        path = directory / f"{group}{SUFFIX}"
        # copies, because the writer refuses tensors that share storage
        safetensors.torch.save_file(
            {n: t.detach().cpu().contiguous().clone() for n, t in named.items()}, path
        )
        # the writer lets only the owner read the file; the directory follows the umask
        path.chmod(directory.stat().st_mode & 0o666)
        make_durable(path)
        files[path.name] = _bytes_and_sha256(path.read_bytes())
    manifest = {"format": FORMAT, "step": step, "state": state, "files": files}
    manifest["self"] = hashlib.sha256(_json(manifest)).hexdigest()
    (directory / STATE_FILE).write_bytes(_json(manifest))
    make_durable(directory / STATE_FILE)
    make_durable(directory)


def save(root: Path, step: int, tensors: Tensors, state: dict, *, keep: int = 2) -> Path:
    """Write root/step-<step> so that a crash at any moment leaves either the old or the new.

    Args:
        root:     directory of all checkpoints of one run; made if missing
        step:     optimizer steps done; a checkpoint of the same step is replaced
        tensors:  group -> name -> dense tensor of DTYPES, of any device and strides
        state:    what JSON has, with finite numbers and string keys; a tuple returns as a list
        keep:     checkpoints left in root: this one and the newest others
    Returns:
        The directory of the checkpoint.
    Raises:
        ValueError: an argument that could not be read back as it is.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    _check_request(step, tensors, state, keep)
    if not root.exists():
        root.mkdir(parents=True)
        make_durable(root.parent)
    _tidy(root)
    final = root / f"step-{step:08d}"
    temporary = _hidden(final)
    try:
        _write(temporary, step, tensors, state)
        if final.exists():
            os.rename(final, final.with_suffix(".replaced"))
        os.rename(temporary, final)
        make_durable(root)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write checkpoint {final}: {error}") from error
    finally:
        _tidy(root)
    for path in [p for p in _newest_first(root) if p != final][keep - 1 :]:
        _discard(path)
    return final


def _refusal(path: Path, name: str, expected: str, got: str) -> ValueError:
    return ValueError(f"checkpoint {path}: {name}: expected {expected}, got {got}")


def _read_manifest(path: Path) -> dict:
    if not (path / STATE_FILE).is_file():
        got = "a directory without it" if path.is_dir() else "no directory"
        raise ValueError(f"{path} is not a checkpoint: expected {STATE_FILE} in it, got {got}")
    raw = (path / STATE_FILE).read_bytes()
    try:
        manifest = dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as error:
        raise _refusal(path, STATE_FILE, "a JSON object", str(error)) from None
    if manifest.get("format") != FORMAT:
        raise _refusal(path, STATE_FILE, f"format {FORMAT}", f"format {manifest.get('format')}")
    # hash the bytes, not the values: 1e-05 and 1E-05 are one bit apart and the same number
    body = raw.replace(f'"self":"{manifest.get("self")}",'.encode(), b"", 1)
    if (digest := hashlib.sha256(body).hexdigest()) != manifest.get("self"):
        raise _refusal(path, STATE_FILE, f"sha256 {manifest.get('self')}", digest)
    if (wrong := _wrong_type(manifest)) is not None:
        raise _refusal(path, STATE_FILE, f"{wrong} as `save` writes it", "another")
    # a copy under a name of the caller's own is welcome, one under another step's name is not
    if _PUBLISHED.fullmatch(path.name) and _step(path) != manifest["step"]:
        raise _refusal(path, STATE_FILE, f"step {_step(path)}", f"step {manifest['step']}")
    return manifest


def _wrong_type(manifest: dict) -> str | None:
    """What of a manifest is not of the type that it is written with."""
    files = manifest.get("files")
    if type(manifest.get("step")) is not int or manifest["step"] < 0:
        return "step"
    if not isinstance(manifest.get("state"), dict):
        return "state"
    kinds = {"bytes": int, "sha256": str}
    if not isinstance(files, dict) or not all(
        re.fullmatch(rf"[A-Za-z0-9_-]+{SUFFIX}", name)
        and isinstance(entry, dict)
        and {key: type(value) for key, value in entry.items()} == kinds
        for name, entry in files.items()
    ):
        return "files"
    return None


def _read_file(path: Path, name: str, expected: dict[str, int | str]) -> dict[str, Tensor]:
    # parse the bytes that were hashed: a second read could meet a file replaced meanwhile
    data = (path / name).read_bytes()
    for unit, got in _bytes_and_sha256(data).items():
        if got != expected[unit]:
            raise _refusal(path, name, f"{unit} {expected[unit]}", f"{got}")
    try:
        return dict(sorted(safetensors.torch.load(data).items()))
    except (safetensors.SafetensorError, KeyError) as error:
        raise _refusal(path, name, "tensors that can be read", str(error)) from None


def _read(path: Path) -> tuple[Tensors, dict]:
    manifest = _read_manifest(path)
    files = manifest["files"]
    found = {entry.name for entry in path.iterdir() if not entry.name.startswith(".")}
    for name in sorted(files.keys() - found):
        raise _refusal(path, name, "a file", "none")
    for name in sorted(found - files.keys() - {STATE_FILE}):
        raise _refusal(path, name, f"no file that {STATE_FILE} does not list", "one")
    tensors = {n.removesuffix(SUFFIX): _read_file(path, n, entry) for n, entry in files.items()}
    return tensors, manifest["state"]


def _intact_hint(path: Path) -> str:
    """What to load instead: the newest intact one before `path`, or else the newest after it."""
    if not _PUBLISHED.fullmatch(path.name):
        return ""
    others = [p for p in _newest_first(path.parent) if p.name != path.name]
    for other in sorted(others, key=lambda p: _step(p) > _step(path)):
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

    Args:
        root:  directory of all checkpoints of one run; may be missing
    Returns:
        Its directory, and what `load` gives of it.
    Raises:
        ValueError: there is none, or all are damaged.
    """
    error = ValueError(f"{root} must hold a checkpoint, got none")
    for path in _newest_first(root):
        try:
            return path, *_read(path)
        except ValueError as refused:
            warnings.warn(f"{refused}; it is passed over", stacklevel=2)
            error = refused
    raise error


def latest(root: Path) -> Path | None:
    """Find the newest published checkpoint by the step in its name, without verifying it.

    Args:
        root:  directory of all checkpoints of one run; may be missing
    Returns:
        Its directory, or None if there is none.
    """
    return next(iter(_newest_first(root)), None)


def _flatten(value: object, prefix: str = "") -> dict[str, object]:
    if not isinstance(value, dict):
        return {prefix.removeprefix("."): value}
    parts = [_flatten(item, f"{prefix}.{key}") for key, item in value.items()]
    return {key: leaf for part in parts for key, leaf in part.items()}


def require_same_config(saved: dict, current: dict, path: Path) -> None:
    """Refuse to resume a run under another configuration.

    Args:
        saved:    configuration in the checkpoint: nested dicts
        current:  configuration of this run: nested dicts; a tuple equals the same list
        path:     the checkpoint, for the message
    Raises:
        ValueError: with the differing keys, at most MAX_DIFFERENCES, and both values of each.
    """
    _check_state(current, "current")
    # through JSON both: it makes a list of the tuple that was saved
    saved, current = (_flatten(json.loads(_json(config))) for config in (saved, current))
    differing = [
        f"{key}: saved {saved.get(key, 'nothing')!r}, current {current.get(key, 'nothing')!r}"
        for key in sorted(saved.keys() | current.keys())
        if key not in saved or key not in current or saved[key] != current[key]
    ]
    if differing:
        shown = "; ".join(differing[:MAX_DIFFERENCES])
        raise ValueError(f"{len(differing)} settings differ from checkpoint {path}: {shown}")
