"""The way of samples from the host to the device, beside the steps."""

import torch
from torch import Tensor


class Staging:
    """Puts tensors on a device: for a GPU through page-locked memory and on a stream of its own.

    The host waits for no copy, and a copy for no step. Locked pages are torch's own: it uses them
    again when what was copied from them has arrived.

    Args:
        device:  to put them on
    """

    def __init__(self, device: torch.device | str):
        self._device = torch.device(device)
        cuda = self._device.type == "cuda"
        self._stream = torch.cuda.Stream(self._device) if cuda else None

    def put(self, tensor: Tensor) -> Tensor:
        """A tensor of the host on the device, for the ops that the current stream runs from now on.

        Where the device is the host it is the tensor itself. On a GPU the host may write over its
        own at once.
        """
        if self._stream is None:
            return tensor.to(self._device)
        locked = tensor.pin_memory()
        steps = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            arrived = locked.to(self._device, non_blocking=True)
        steps.wait_stream(self._stream)
        # its memory is the copies' to use again, which must not overtake the steps that read it
        arrived.record_stream(steps)
        return arrived
