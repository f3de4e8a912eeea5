"""The directory that has the checkpoints of a run: their names, and what a save leaves there."""

import errno
import os
import re
import shutil
from pathlib import Path

from dbkernels import whole_file
from dbkernels.memory.units import in_words
from dbkernels.training.checkpoint.manifest import STATE_FILE

# .replaced is a complete checkpoint that counts until the new save of its step is in place
PUBLISHED = re.compile(r"step-([0-9]{8,})(?:\.replaced)?")
_TEMPORARY = re.compile(r"\.(?:step-[0-9]{8,}(?:\.replaced)?|probe)-([0-9]{1,7})")


def step_of(path: Path) -> int:
    """The step in the name of a published checkpoint."""
    found = PUBLISHED.fullmatch(path.name)
    assert found is not None
    return int(found[1])


def newest_first(root: Path) -> list[Path]:
    """The published checkpoints, by the steps in their names."""
    try:
        names = os.listdir(root)
    except FileNotFoundError:
        return []
    found = [root / name for name in names if PUBLISHED.fullmatch(name)]
    paths = [path for path in found if (path / STATE_FILE).exists()]
    return sorted(paths, key=lambda p: (step_of(p), p.suffix == ""), reverse=True)


def latest(root: Path) -> Path | None:
    """Find the newest published checkpoint by the step in its name, without verifying it.

    Args:
        root:  directory of all checkpoints of one run; may be missing
    Returns:
        Its directory, or None if there is none.
    """
    return next(iter(newest_first(root)), None)


def hidden(path: Path) -> Path:
    """The name that a checkpoint has until it is published."""
    return path.with_name(f".{path.name}-{os.getpid()}")


def discard(path: Path) -> None:
    """Remove a published checkpoint."""
    if path.is_symlink():
        return path.unlink()
    # hidden first: a removal that is cut short must not leave half a checkpoint under a good name
    os.rename(path, hidden(path))
    shutil.rmtree(hidden(path))


def tidy(root: Path) -> None:
    """Finish what a save that was cut short has left."""
    others = {p.name for p in Path("/proc").iterdir()} - {str(os.getpid())}
    for path in list(root.iterdir()):
        temporary = _TEMPORARY.fullmatch(path.name)
        # our own pid too: in a container that restarts, the run that died often had it
        if temporary and temporary[1] not in others:
            shutil.rmtree(path)
        elif PUBLISHED.fullmatch(path.name) and path.suffix:
            final = path.with_suffix("")
            if final.exists():
                discard(path)
            else:
                os.rename(path, final)


def check_root(root: Path, nbytes: int) -> None:
    """Find out whether checkpoints can be saved into a directory; it is made where it is missing.

    Args:
        root:    directory of all checkpoints of one run
        nbytes:  of one
    Raises:
        ValueError: something that is no checkpoint has the name of one, or there is no room.
        OSError: the directory cannot be made, listed or written.
    """
    whole_file.make_directory(root)
    check_names(root)
    probe = hidden(root / "probe")
    # of a run that died and had our number; what else is left is for `save` to tidy, which nobody
    # does beside another one
    shutil.rmtree(probe, ignore_errors=True)
    try:
        probe.mkdir()
        with whole_file.new_file(probe / STATE_FILE) as file:
            file.write(bytes(512))
    except OSError as error:
        raise told(f"cannot write into {root}", error) from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)
    if (free := shutil.disk_usage(root).free) < nbytes:
        raise ValueError(
            f"{root} must have {in_words(nbytes)} free for a checkpoint, got {in_words(free)}"
        )


def check_names(root: Path) -> None:
    """Refuse what has the name of a checkpoint and is none."""
    for path in map(root.joinpath, sorted(os.listdir(root))):
        published, link = PUBLISHED.fullmatch(path.name), path.is_symlink()
        if not (published or _TEMPORARY.fullmatch(path.name)):
            continue
        if not path.is_dir() or (link and not published):
            got = "a link" if link else "a file"
            raise ValueError(f"{path} must be the directory of a checkpoint, got {got}")


def told(what: str, error: OSError) -> OSError:
    """An error of the disk that says what it was in the way of."""
    found = OSError(f"{what}: {error.strerror or error}")
    found.errno = error.errno
    return found


def is_not_whole(error: ValueError | OSError) -> bool:
    """Whether an error is of a checkpoint that is not whole, and not of what it lies in."""
    gone = (errno.ENOENT, errno.ENOTDIR, errno.EIO)
    return not isinstance(error, OSError) or error.errno in gone
