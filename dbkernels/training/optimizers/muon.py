"""Muon on the matrices of layers, and AdamW on all else, as its users have it.

Jordan et al. 2024 make of a matrix's momentum the nearest one with orthogonal rows, by
Newton-Schulz steps. Updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv:2502.16982),
so that one rate serves both. Queries, keys and values are one matrix here.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Muon, Optimizer

from dbkernels.training.optimizers.adamw import FusedAdamW
from dbkernels.training.optimizers.kind import State, Trained, groups_of
from dbkernels.training.optimizers.skipping import skipping

SkippingMuon = skipping(Muon)


class MuonAndAdamW:
    """torch's Muon and fused AdamW."""

    name, capturable, by_element = "muon", False, False
    counts: tuple[str, ...] = ()

    def make(self, trained: Sequence[Trained], *, captured: bool) -> list[Optimizer]:
        """As `Kind.make`."""
        matrices = [each for each in trained if _is_of_layers(each)]
        others = [each for each in trained if not _is_of_layers(each)]
        made = FusedAdamW().make(others, captured=captured)
        if matrices:
            made.append(SkippingMuon(groups_of(matrices), adjust_lr_fn="match_rms_adamw"))
        return made

    def state(self, optimizer: Optimizer, tensor: Tensor) -> State:
        """As `Kind.state`."""
        if isinstance(optimizer, Muon):
            return {"momentum_buffer": torch.zeros_like(tensor.detach())}
        return FusedAdamW().state(optimizer, tensor)


def _is_of_layers(trained: Trained) -> bool:
    return trained.tensor.dim() == 2 and "layers" in trained.name.split(".")
