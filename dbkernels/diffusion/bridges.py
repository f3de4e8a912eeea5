"""How a noisy token goes from one level to the next, once the probabilities of its words are known.

    z' = r z + (1 - r) D,    r = following / level

    soft    D is the expected row under the probabilities: the Euler step of the probability flow
    argmax  D is the likeliest word's row: as if the probabilities were sharpened without end
    sample  D is the row of a word that is drawn from the probabilities

Where z = e + level * noise and the probabilities are those of e given z, `sample` alone leaves a z'
that is distributed as e + following * noise: e and the word are alike given z, so that
z' = D + r (z - D) is. arXiv:2506.14202 steps as soft does.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from dbkernels.diffusion.unmask import choose
from dbkernels.ops.philox import Draw, uniforms
from dbkernels.settings import check_choice

BridgeName = Literal["soft", "argmax", "sample"]
DEFAULT_BRIDGE: BridgeName = "sample"
Bridge = Callable[[Tensor, Tensor, Tensor, float, float, Draw], Tensor]


def bridge(name: BridgeName) -> Bridge:
    """The bridge of a name: (probabilities, table, z, level, following, draw) -> z'.

        probabilities  (B, ..., V)  of each token's word, answered from z at `level`
        table          (V, D)       clean rows
        z              (B, ..., D)  at `level`
        level          of z, positive, in its units
        following      of z', at least 0 and below `level`
        draw           names one number for each token; a token's depends on its sample's place in
                       the draw and on its own place in the sample; `sample` alone reads it
        z'             (B, ..., D), dtype of z

    Raises:
        ValueError: there is no bridge of that name, or, when it is called, the levels are not as
            above.
    """
    check_choice("bridge", name, get_args(BridgeName))
    row = _ROWS[name]

    def crossed(
        probabilities: Tensor,
        table: Tensor,
        z: Tensor,
        level: float,
        following: float,
        draw: Draw,
    ) -> Tensor:
        if not 0 <= following < level:
            raise ValueError(
                "levels of a bridge must have 0 <= following < level, "
                f"got level {level} and following {following}"
            )
        D = row(probabilities, table, draw).to(z.dtype)
        return D + following / level * (z - D)

    return crossed


def _expected(probabilities: Tensor, table: Tensor, draw: Draw) -> Tensor:
    return probabilities.to(table.dtype) @ table


def _likeliest(probabilities: Tensor, table: Tensor, draw: Draw) -> Tensor:
    return table[probabilities.argmax(-1)]


def _drawn(probabilities: Tensor, table: Tensor, draw: Draw) -> Tensor:
    B, *places, V = probabilities.shape
    u = uniforms(draw, B, torch.Size(places).numel(), device=probabilities.device)
    words = choose(probabilities.reshape(-1, V), u.flatten())
    return table[words.view(B, *places)]


_ROWS = {"soft": _expected, "argmax": _likeliest, "sample": _drawn}
