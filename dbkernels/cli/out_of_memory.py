"""Which errors say that a device or the host is out of memory."""

import torch

HOST = "DefaultCPUAllocator: "  # torch has no class for a host that is out of memory


def out_of_memory(error: BaseException) -> str | None:
    """What an error says, if it says that there is no memory left.

    Args:
        error:  any
    Returns:
        its sentence, or None for an error of another kind.
    """
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return text or "out of memory"
    if isinstance(error, RuntimeError) and HOST in text:
        return text.partition(HOST)[2]
    return None
