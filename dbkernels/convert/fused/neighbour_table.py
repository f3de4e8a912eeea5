"""The op's table of the cosines and sines that a model hands to all of its layers."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from dbkernels.convert.pairing import table_by_halves


class _Made(NamedTuple):
    sin: weakref.ref
    versions: tuple[int, int]
    """Of the cosines and of the sines, when the table was made."""
    table: Tensor


_TABLES = WeakIdKeyDictionary()  # of each tensor of cosines


@torch.compiler.disable
def neighbour_table(cos: Tensor, sin: Tensor, device: torch.device) -> Tensor:
    """The table (2, T, d) of an op, from one that is paired by neighbours; made once for a pair.

    Args:
        cos, sin:  (T, d) each; the elements of a pair are equal
        device:    of the table
    Raises:
        ValueError: a shape is another one, or the elements of a pair differ.
    """
    versions, made = (cos._version, sin._version), _TABLES.get(cos)
    known = made is not None and made.sin() is sin and made.versions == versions
    if not known or made.table.device != device:
        table = table_by_halves(cos.detach(), sin.detach()).to(device)
        made = _TABLES[cos] = _Made(weakref.ref(sin), versions, table)
    return made.table
