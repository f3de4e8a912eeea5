"""Checkpoints that come back exactly as they were saved, or are refused.

    root/step-00000123/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

A save writes a hidden sibling directory, makes it durable and publishes it with one rename.
state.json has the size and sha256 of every file, and its own sha256. Nothing is ever unpickled.
Tensors are hashed while they are written, in pieces (`tensor_file`). One process saves into a root
at a time, and its threads one after another; any number may read it meanwhile.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import threading
import warnings
from collections.abc import Collection
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from dbkernels.memory.units import in_words
from dbkernels.settings import check_number
from dbkernels.training.tensor_file import DTYPES, Read, pieces, write_tensors
from dbkernels.whole_file import make_directory, make_durable, new_file

Tensors = dict[str, dict[str, Tensor]]  # group ("model", "ema", ...) -> tensor name -> tensor

FORMAT = 1
STATE_FILE = "state.json"
SUFFIX = ".safetensors"
UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EIO)  # of a checkpoint that is not whole
READ_AGAIN = 20  # times, where a writer has moved what was to be read

# .replaced is a complete checkpoint that counts until the new save of its step is in place
_PUBLISHED = re.compile(r"step-([0-9]{8,})(?:\.replaced)?")
_TEMPORARY = re.compile(r"\.(?:step-[0-9]{8,}(?:\.replaced)?|probe)-([0-9]{1,7})")
_SAVING = threading.Lock()


def as_json(value: object) -> bytes:
    """The same bytes for the same value."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _step(path: Path) -> int:
    found = _PUBLISHED.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def _newest_first(root: Path) -> list[Path]:
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    found = [root / name for name in names if _PUBLISHED.fullmatch(name)]
    paths = [path for path in found if (path / STATE_FILE).exists()]
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


def _check_request(step: int, tensors: Tensors, state: dict, keep: int) -> None:
    check_number("keep", keep, 1)
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"step must be an integer of at least 0, got {step!r}")
    if not isinstance(state, dict):
        raise ValueError(f"state must be a dict, got {type(state).__name__}")
    check_state(state, "state")
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


def _write(
    directory: Path, step: int, tensors: Tensors, state: dict, read: Read, finite: Collection[str]
) -> None:
    directory.mkdir()
    files = {}
    for group, named in tensors.items():
        path = directory / f"{group}{SUFFIX}"
        with new_file(path) as file:
            size, digest = write_tensors(file, named, read=read, finite=group in finite)
        make_durable(path)
        files[path.name] = {"bytes": size, "sha256": digest}
    manifest = {"format": FORMAT, "step": step, "state": state, "files": files}
    manifest["self"] = hashlib.sha256(as_json(manifest)).hexdigest()
    with new_file(directory / STATE_FILE) as file:
        file.write(as_json(manifest))
    make_durable(directory / STATE_FILE)
    make_durable(directory)


def check_root(root: Path, nbytes: int) -> None:
    """Find out whether checkpoints can be saved into a directory; it is made where it is missing.

    Args:
        root:    directory of all checkpoints of one run
        nbytes:  of one
    Raises:
        ValueError: something that is no checkpoint has the name of one, or there is no room.
        OSError: the directory cannot be made, listed or written.
    """
    make_directory(root)
    _check_names(root)
    probe = _hidden(root / "probe")
    # of a run that died and had our number; what else is left is for `save` to tidy, which nobody
    # does beside another one
    shutil.rmtree(probe, ignore_errors=True)
    try:
        probe.mkdir()
        with new_file(probe / STATE_FILE) as file:
            file.write(bytes(512))
    except OSError as error:
        raise _told(f"cannot write into {root}", error) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) < nbytes:
        raise ValueError(
            f"{root} must have {in_words(nbytes)} free for a checkpoint, got {in_words(free)}"
        )


def _check_names(root: Path) -> None:
    for path in map(root.joinpath, sorted(os.listdir(root))):
        published, link = _PUBLISHED.fullmatch(path.name), path.is_symlink()
        if not (published or _TEMPORARY.fullmatch(path.name)):
            continue
        if not path.is_dir() or (link and not published):
            got = "a link" if link else "a file"
            raise ValueError(f"{path} must be the directory of a checkpoint, got {got}")


def _told(what: str, error: OSError) -> OSError:
    told = OSError(f"{what}: {error.strerror or error}")
    told.errno = error.errno
    return told


def save(
    root: Path,
    step: int,
    tensors: Tensors,
    state: dict,
    *,
    keep: int = 2,
    read: Read = pieces,
    finite: Collection[str] = (),
) -> Path:
    """Write root/step-<step> so that a crash at any moment leaves either the old or the new.

    Args:
        root:     directory of all checkpoints of one run; made if missing
        step:     optimizer steps done; a checkpoint of the same step is replaced
        tensors:  group -> name -> dense tensor of DTYPES, of any device and strides
        state:    what JSON has, with finite numbers and string keys; a tuple returns as a list
        keep:     checkpoints left in root: this one and the newest others
        read:     gives a tensor's bytes, in pieces
        finite:   groups in which every number must be finite
    Returns:
        The directory of the checkpoint.
    Raises:
        ValueError: an argument that could not be read back as it is, or something that is no
                    checkpoint has the name of one.
        FloatingPointError: a number that must be finite is not; earlier checkpoints are untouched.
        OSError: the disk refused; earlier checkpoints are untouched.
    """
    _check_request(step, tensors, state, keep)
    with _SAVING:
        make_directory(root)
        _check_names(root)
        _tidy(root)
        final = root / f"step-{step:08d}"
        temporary = _hidden(final)
        try:
            _write(temporary, step, tensors, state, read, finite)
            if final.exists():
                os.rename(final, final.with_suffix(".replaced"))
            os.rename(temporary, final)
            make_durable(root)
        except OSError as error:
            raise _told(f"cannot write checkpoint {final}", error) from error
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
        listed = _newest_first(root)
        for path in listed:
            found = _identity(path)
            try:
                return path, *_read(path)
            except (ValueError, OSError) as refused:
                if isinstance(refused, OSError) and refused.errno not in UNREADABLE:
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


def latest(root: Path) -> Path | None:
    """Find the newest published checkpoint by the step in its name, without verifying it.

    Args:
        root:  directory of all checkpoints of one run; may be missing
    Returns:
        Its directory, or None if there is none.
    """
    return next(iter(_newest_first(root)), None)
