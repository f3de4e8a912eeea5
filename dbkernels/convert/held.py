"""What the code of each layout computes, where a model may compute something else."""

import warnings
from typing import Literal

from dbkernels.models.dit import DiTConfig
from dbkernels.models.vit import ViTConfig

Layout = Literal["dit", "diffusers", "timm"]

# a setting, what it must be, and in whose code
_OF_A_DIT = {"process": "vp", "prediction": "epsilon", "positions": "sin_cos"}
_REFUSED = {
    "dit": _OF_A_DIT,
    "diffusers": {**_OF_A_DIT, "mlp_ratio": 4},
    "timm": {"affine": True, "mlp": "gelu_exact", "eps": 1e-6, "silu_modulation": False},
}


def check_held(config: DiTConfig | ViTConfig, layout: Layout) -> None:
    """Refuse a network that a layout's code cannot be, and warn of one that it rounds otherwise.

    Raises:
        ValueError: with the first setting that is another one.
    """
    for name, value in _REFUSED[layout].items():
        if getattr(config, name) != value:
            raise ValueError(f"{name} must be {value} for {layout}, got {getattr(config, name)}")
    if not isinstance(config, DiTConfig):
        return
    expected = "closed" if layout == "diffusers" else "open"
    if config.frequencies != expected:
        warnings.warn(
            f"the code of {layout} makes the sinusoid of a step with {expected} frequencies, and "
            f"the model with {config.frequencies} ones: what it computes of these weights differs",
            stacklevel=3,
        )
    if layout == "dit" and config.eps2 not in (None, 1e-6):
        warnings.warn(
            f"the code of dit has an eps of 1e-06 in the norm before an MLP, and the model one of "
            f"{config.eps2}: what it computes of these weights differs a little",
            stacklevel=3,
        )
