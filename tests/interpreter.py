"""Repairs of Triton's interpreter, which stands in for a GPU where there is none."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_convert_upstream = interpreter._convert_float
_patch_upstream = interpreter._patch_lang_tensor


def repair():
    interpreter._convert_float = _convert_float
    interpreter._patch_lang_tensor = _patch_lang_tensor


def _convert_float(data, source, target, rounding_mode):
    """The bits of `data` in another float type, as an unsigned integer array."""
    nearest = rounding_mode in (None, interpreter._ir.ROUNDING_MODE.RTNE)
    # a GPU rounds float32 to the nearest bfloat16, ties to even; the interpreter cuts the bits off,
    # which is a bias that a comparison with torch would have to allow for
    if (source, target) == (tl.float32, tl.bfloat16) and nearest:
        x = torch.from_numpy(np.array(data, dtype=np.float32))
        return x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    # the way back is a shift; the interpreter makes a subnormal 0
    if (source, target) == (tl.bfloat16, tl.float32):
        return np.left_shift(data, 16, dtype=np.uint32)
    return _convert_upstream(data, source, target, rounding_mode)


def _patch_lang_tensor(tensor, scope):
    _patch_upstream(tensor, scope)
    # a loop bound: triton 3.6 takes int() of an array of shape (1,), which numpy 2.4 refuses
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))
