"""A trained network to start from: a run of this package, or somebody else's file."""

from pathlib import Path

import torch

from dbkernels.convert.checkpoint import load
from dbkernels.convert.files import PICKLED
from dbkernels.models.registry import FAMILIES, family_of
from dbkernels.models.start import Trained
from dbkernels.training.checkpoint import STATE_FILE
from dbkernels.training.trained import trained_run


def open_trained(path: str | Path, *, num_heads: int | None = None) -> Trained:
    """A network that was trained end to end, as blocks can start from it.

    Args:
        path:       of a run, of one of its checkpoints, or as that of `load`
        num_heads:  as that of `load`
    Raises:
        ValueError: there is no such network, it is damaged or trained in several blocks, or as
            `load`.
    """
    path = Path(path)
    folder = path.is_dir() and not _is_run(path)
    if not folder and path.suffix not in (*PICKLED, ".safetensors"):
        return trained_run(path)
    # what a file has no weights for is drawn, and has to be the same whenever the file is read
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = load(path, num_heads=None if folder else num_heads)
    entry = family_of(model)
    name = next(name for name, each in FAMILIES.items() if each is entry)
    return Trained(str(path), name, model.config, model.state_dict())


def _is_run(path: Path) -> bool:
    # the folder of a pipeline or of a network has a config.json too
    return (path / "checkpoints").is_dir() or (path / STATE_FILE).is_file()
