"""The layer of the published DiT, which it calls a block, and those of its shape, such as SiT's.

    DiTBlock, SiTBlock, ...    attn.qkv, attn.proj, mlp.fc1, mlp.fc2, adaLN_modulation

Peebles & Xie 2023 (arXiv:2212.09748); Ma et al. 2024 (arXiv:2401.08740).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.convert.fused.layer import (
    FusedLayer,
    check_no_dropout,
    check_one_dtype,
    check_signature,
    normal,
    of_each_sample,
)
from dbkernels.convert.read_block import PROJECTIONS, read_config
from dbkernels.models.layer import fold_norms
from dbkernels.ops.layer.function import adaln_layer
from dbkernels.ops.layer.projection import linear
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.ops.layer.weights import LayerWeights

_PARTS = ("attn", "mlp", "adaLN_modulation")


class FusedDiTBlock(FusedLayer):
    """Called as block(x, c)."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        config = read_config(original)
        check_signature(original, "x", "c")
        check_no_dropout(original)
        check_one_dtype(original, *PROJECTIONS)
        norms = tuple(name for name in ("norm1", "norm2") if name in original._modules)
        super().__init__(original, recompute, (*norms, *_PARTS))
        self.config = config

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its shape."""
        inside = {name for name, _ in module.named_modules()}
        return {*_PARTS, "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"} <= inside

    def example(self, random: torch.Generator) -> Sequence[object]:
        """x (2, 4, D), with a variance that shows the eps of a norm, and c (2, cond_dim)."""
        x = 0.1 * normal(random, 2, 4, self.config.dim) + 0.2
        return x, normal(random, 2, self.config.cond_dim)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, T, D) and c (B, cond_dim), of a B of 1 for all -> (B, T, D)."""
        self.check()
        if torch.compiler.is_exporting():
            return self.original(x, c)
        projection = self.adaLN_modulation[1]
        modulation = linear(F.silu(of_each_sample(x, c)), projection.weight, projection.bias)
        modulation = fold_norms(modulation, *(self._of_norm(name) for name in ("norm1", "norm2")))
        return adaln_layer(
            x,
            modulation,
            self._weights(),
            recompute=self.recompute,
            **self.config.of_op(),
        )

    def _of_norm(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias."""
        norm = self._modules.get(name)
        return getattr(norm, "weight", None), getattr(norm, "bias", None)

    def _weights(self) -> LayerWeights:
        attn, mlp = self.attn, self.mlp
        projections = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        parameters = [p for each in projections for p in (each.weight, each.bias)]
        if self.config.qk_norm:
            parameters += [attn.q_norm.weight, attn.k_norm.weight]
        return LayerWeights(*parameters)
