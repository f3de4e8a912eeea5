"""timm's layer of a vision transformer, which it calls a block, as a layer without a condition.

    norm1, norm2      weight w and bias b: scale = w - 1, shift = b
    ls1, ls2          gamma: gate = gamma, or 1 where there is none

Dosovitskiy et al. 2020 (arXiv:2010.11929); layer scale, Touvron et al. 2021 (arXiv:2103.17239).
"""

import inspect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dbkernels.convert.fused import parts
from dbkernels.convert.fused.layer import FusedLayer, check_no_dropout, normal
from dbkernels.models.layer import LayerConfig
from dbkernels.ops import LayerWeights, adaln_layer
from dbkernels.ops.layer.recompute import Recompute

_PROJECTIONS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_READ = ("norm1", "attn", "ls1", "norm2", "mlp", "ls2")
_IDLE = ("drop_path1", "drop_path2", "drop_path")
_SIGNATURE = ("x", "attn_mask", "is_causal")


class FusedTimmBlock(FusedLayer):
    """Called as block(x), or with is_causal; without a mask of its own."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        config = _read(original)
        idle = (name for name in _IDLE if name in original._modules)
        super().__init__(original, recompute, (*_READ, *idle))
        self.config = config

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its shape."""
        inside = {name for name, _ in module.named_children()}
        return {*_READ} <= inside and "adaLN_modulation" not in inside

    def example(self, random: torch.Generator) -> Sequence[object]:
        """x (2, 4, D), with a variance that shows the eps of a norm."""
        return (0.1 * normal(random, 2, 4, self.config.dim) + 0.2,)

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        self.check()
        if attn_mask is not None:
            raise ValueError(f"attn_mask must be None, got {tuple(attn_mask.shape)}")
        if torch.compiler.is_exporting():
            return self.original(x, is_causal=True) if is_causal else self.original(x)
        return adaln_layer(
            x,
            self._modulation(x).expand(len(x), -1),
            self._weights(),
            recompute=self.recompute,
            attention="causal" if is_causal else "full",
            **self.config.of_op(),
        )

    def _modulation(self, x: Tensor) -> Tensor:
        """(1, 6 D), float32 or wider: 1 + scale in bfloat16 would lose the weight's digits."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        one = torch.ones(self.config.dim, dtype=dtype, device=x.device)
        of_all = []
        for norm, scale in ((self.norm1, self.ls1), (self.norm2, self.ls2)):
            weight, bias = parts.affine_of(norm)
            of_all += [
                torch.zeros_like(one) if bias is None else bias.to(dtype),
                torch.zeros_like(one) if weight is None else weight.to(dtype) - 1,
                one if isinstance(scale, nn.Identity) else scale.gamma.to(dtype),
            ]
        return torch.cat(of_all)[None]

    def _weights(self) -> LayerWeights:
        attn, mlp = self.attn, self.mlp
        linears = (attn.qkv, attn.proj, mlp.fc1, mlp.fc2)
        parameters = [p for linear in linears for p in (linear.weight, linear.bias)]
        if self.config.qk_norm:
            parameters += [attn.q_norm.weight, attn.k_norm.weight]
        return LayerWeights(*parameters)


def _read(original: nn.Module) -> LayerConfig:
    names = tuple(inspect.signature(type(original).forward).parameters)[1:]
    if names not in {_SIGNATURE[:count] for count in (1, 2, 3)}:
        raise ValueError(f"its forward must take {', '.join(_SIGNATURE)}, got {', '.join(names)}")
    check_no_dropout(original)
    qkv, _, _, fc2 = parts.projections(original, *_PROJECTIONS)
    for name in ("ls1", "ls2"):
        scale = parts.part(original, name)
        if type(scale) is not nn.Identity and not hasattr(scale, "gamma"):
            raise ValueError(f"{name} must be an Identity or have gamma, got {scale}")
    d = parts.head_width_of(original, "attn", "num_heads", qkv.out_features, 3)
    norm1, norm2 = parts.norms_of(original, "norm1", "norm2")
    qk_eps = parts.qk_eps_of(original, "attn.q_norm", "attn.k_norm")
    return LayerConfig(
        qkv.in_features,
        original.attn.num_heads,
        fc2.in_features,
        cond_dim=0,
        norm=norm1.kind,
        mlp=parts.gelu_of(original, "mlp.act"),
        qk_norm=qk_eps is not None,
        eps=norm1.eps,
        eps2=norm2.eps,
        qk_eps=LayerConfig.qk_eps if qk_eps is None else qk_eps,
        head_dim=d,
    )
