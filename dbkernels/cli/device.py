"""The device that a verb runs on."""

import os

import torch


def pick_device(name: str) -> torch.device:
    """The named device; "auto" is an NVIDIA GPU where there is one, else the CPU.

    Raises:
        ValueError: the name is no device of this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device must be auto, cpu or cuda, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name} needs an NVIDIA GPU, got a machine without one")
    if device.type == "cuda" and (device.index or 0) >= (count := torch.cuda.device_count()):
        raise ValueError(f"device {name} must be below cuda:{count} on this machine")
    return device


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs that torchrun's processes share out, this one's."""
    local = os.environ.get("LOCAL_RANK")
    if device.type != "cuda" or local is None or device.index is not None:
        return device
    return pick_device(f"cuda:{local}")
