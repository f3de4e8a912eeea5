"""Train deep residual transformers one block at a time.

Each name is imported when it is first asked for: torch takes seconds, in which the command line has
to answer to Ctrl-C.
"""

from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

_HOMES = {
    "AR": "models",
    "AdaLNLayer": "models",
    "Block": "training.partition",
    "DiT": "models",
    "DiffusionBlocks": "training.diffusion_blocks",
    "Draw": "ops.philox",
    "Huginn": "models",
    "Job": "training.parallel.job",
    "Flow": "diffusion.flow",
    "GeneratedText": "training.generated_text",
    "LayerConfig": "models",
    "LogNormal": "diffusion.gaussian",
    "MDM": "models",
    "MMDiT": "models",
    "Masked": "diffusion.masked",
    "OwnLayers": "models",
    "Timesteps": "diffusion.timesteps",
    "Trainer": "training.trainer",
    "TrainerConfig": "training.trainer",
    "ViT": "models",
    "as_data": "data.dataset",
    "block_at": "training.partition",
    "measure_peak": "memory.measure",
    "merge": "training.merge",
    "open_captions": "data.captions",
    "open_data": "data.images",
    "open_job": "training.parallel.job",
    "open_tokens": "data.tokens",
    "partition": "training.partition",
    "write_tokens": "data.token_files",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name == "__version__":
        return _version()
    if not name.startswith("_") and find_spec(f"{__name__}.{name}"):
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _version() -> str:
    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:  # a checkout on the path that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, "__version__"})
