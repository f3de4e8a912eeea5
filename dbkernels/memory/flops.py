"""Floating-point operations of one call of an op, by torch's own formulas.

A multiplication and an addition count as two. Elementwise ops count as none.
"""

import torch
from torch._ops import OpOverload
from torch.utils.flop_counter import (
    addmm_flop,
    flop_registry,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

_aten = torch.ops.aten


def _attention(q, k, v, *_, **__) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _attention_backward(dout, q, k, v, *_, **__) -> int:
    return sdpa_backward_flop_count(dout.shape, q.shape, k.shape, v.shape)


# what torch's table lacks
_MORE = {
    _aten.addmm_: addmm_flop,
    _aten._addmm_activation: addmm_flop,
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def flops(func: OpOverload, args: tuple, kwargs: dict, out: object) -> int:
    """Operations of one call of an op; 0 for an op without a formula.

    Args:
        func:    the op
        args:    that it was called with
        kwargs:  that it was called with
        out:     what it returned
    """
    packet = func.overloadpacket
    if packet in _MORE:
        return _MORE[packet](*args, **kwargs, out_val=out)
    formula = flop_registry.get(packet)
    return 0 if formula is None else formula(*args, **kwargs, out_val=out)
