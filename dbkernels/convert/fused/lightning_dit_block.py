"""LightningDiT's layer, which it calls a block: a DiT's with RMS norms, rotary positions, SwiGLU.

    attn.qkv, attn.proj, attn.q_norm, attn.k_norm    rows of q and k by halves where they are turned
    mlp.w12, mlp.w3, or mlp.fc1, mlp.fc2             silu(first half of w12) * second half
    adaLN_modulation.1                               6 D, or 4 D where nothing is shifted

Yao & Wang 2025 (arXiv:2501.01423). The positions come with each call, as a module that has
freqs_cos and freqs_sin (T, d) and turns neighbours: t * freqs_cos + rotate_half(t) * freqs_sin.
"""

import inspect
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.convert.fused import parts
from dbkernels.convert.fused.layer import (
    FusedLayer,
    check_no_dropout,
    check_signature,
    normal,
    of_each_sample,
)
from dbkernels.convert.pairing import halves_of_neighbours, qkv_by_halves, table_by_halves
from dbkernels.models.layer import LayerConfig, fold_norms
from dbkernels.ops import LayerWeights, adaln_layer, linear
from dbkernels.ops.layer.recompute import Recompute

_SIGNATURE = ("x", "c", "feat_rope")
TOLERANCE = 1e-5  # of what a module of positions makes of float32, against its table
# of each module of positions, what its table was made of, and the table
_TABLES: weakref.WeakKeyDictionary[nn.Module, tuple[object, Tensor]] = weakref.WeakKeyDictionary()


class FusedLightningDiTBlock(FusedLayer):
    """Called as block(x, c, feat_rope)."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        check_signature(original, *_SIGNATURE)
        check_no_dropout(original)
        config = _read(original)
        reads = ("norm1", "norm2", "attn", "mlp", "adaLN_modulation")
        super().__init__(original, recompute, reads)
        self.config, d = config, config.head_dim
        self._rows = None if d % 2 else qkv_by_halves(d, config.num_heads)

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its shape, and that its forward takes feat_rope."""
        inside = {name for name, _ in module.named_modules()}
        shape = {"attn.qkv", "attn.proj", "mlp", "adaLN_modulation.1"} <= inside
        return shape and "feat_rope" in inspect.signature(type(module).forward).parameters

    def example(self, random: torch.Generator) -> Sequence[object]:
        """x (2, 4, D), with a variance that shows the eps of a norm, c, and positions."""
        x = 0.1 * normal(random, 2, 4, self.config.dim) + 0.2
        d = self.config.head_dim
        rope = None if d % 2 else NeighbourRotary(normal(random, 4, d // 2))
        return x, normal(random, 2, self.config.cond_dim), rope

    def forward(self, x: Tensor, c: Tensor, feat_rope: nn.Module | None = None) -> Tensor:
        """x (B, T, D), c (B, cond_dim) and positions of T tokens -> (B, T, D)."""
        self.check()
        if torch.compiler.is_exporting():
            return self.original(x, c, feat_rope)
        rotary = None
        if feat_rope is not None:
            rotary = table_of(feat_rope, x.shape[1], self.config.head_dim)
        return adaln_layer(
            x,
            self._modulation(of_each_sample(x, c)),
            self._weights(None if rotary is None else self._order(x.device)),
            rotary=rotary,
            recompute=self.recompute,
            **self.config.of_op(),
        )

    def _modulation(self, c: Tensor) -> Tensor:
        """(B, 6 D)."""
        projection = self.adaLN_modulation[1]
        modulation = linear(F.silu(c), projection.weight, projection.bias)
        if len(projection.weight) == 4 * self.config.dim:  # nothing is shifted
            zeros = modulation.new_zeros((len(modulation), self.config.dim))
            first, second = modulation.chunk(2, dim=-1)
            modulation = torch.cat([zeros, first, zeros, second], dim=-1)
        norms = (parts.affine_of(norm) for norm in (self.norm1, self.norm2))
        return fold_norms(modulation, *norms)

    def _order(self, device: torch.device) -> Tensor:
        """Of the rows of qkv, where positions turn its queries and keys."""
        if self._rows is None:
            raise ValueError(
                f"feat_rope must be None for heads of an odd width, {self.config.head_dim}"
            )
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows

    def _weights(self, order: Tensor | None) -> LayerWeights:
        attn, mlp = self.attn, self.mlp
        first, last = (mlp.w12, mlp.w3) if self.config.mlp == "swiglu" else (mlp.fc1, mlp.fc2)
        others = [p for each in (attn.proj, first, last) for p in (each.weight, each.bias)]
        if self.config.qk_norm:
            norms = attn.q_norm.weight, attn.k_norm.weight
            # of the first head, which are those of any
            own = None if order is None else order[: self.config.head_dim]
            others += norms if own is None else [weight[own] for weight in norms]
        return LayerWeights(*parts.stacked([attn.qkv], order), *others)


class NeighbourRotary(nn.Module):
    """Positions as they come with a call, from angles (T, d / 2)."""

    def __init__(self, angles: Tensor):
        super().__init__()
        angles = angles.repeat_interleave(2, dim=-1)
        self.register_buffer("freqs_cos", angles.cos().float())
        self.register_buffer("freqs_sin", angles.sin().float())

    def forward(self, t: Tensor) -> Tensor:
        """(..., T, d) -> (..., T, d)."""
        turned = torch.stack([-t[..., 1::2], t[..., ::2]], dim=-1).flatten(-2)
        return t * self.freqs_cos + turned * self.freqs_sin


@torch.compiler.disable
def table_of(rope: nn.Module, T: int, d: int) -> Tensor:
    """The table of an op from a module of positions; made and compared with it once.

    Returns:
        (2, T, d) float32.
    Raises:
        ValueError: it has no such buffers, or its forward computes something else than they say.
    """
    cos, sin = (getattr(rope, name, None) for name in ("freqs_cos", "freqs_sin"))
    for name, t in {"freqs_cos": cos, "freqs_sin": sin}.items():
        if not isinstance(t, Tensor) or t.shape != (T, d):
            got = tuple(t.shape) if isinstance(t, Tensor) else t
            raise ValueError(f"{name} of feat_rope must be (T, d) = ({T}, {d}), got {got}")
    made_of = tuple((id(t), t._version, t.dtype, t.device) for t in (cos, sin))
    if (known := _TABLES.get(rope)) is not None and known[0] == made_of:
        return known[1]
    with torch.no_grad():
        table = table_by_halves(cos, sin)
        order = halves_of_neighbours(d).to(cos.device)
        t = torch.linspace(-1, 1, T * d, dtype=torch.float32, device=cos.device).view(1, 1, T, d)
        by_halves = t[..., order]
        first, second = by_halves.chunk(2, dim=-1)
        expected = by_halves * table[0] + torch.cat([-second, first], dim=-1) * table[1]
        difference = (rope(t)[..., order] - expected).abs().max()
    if not difference <= TOLERANCE:
        raise ValueError(
            f"feat_rope must turn neighbours by its freqs_cos and freqs_sin, got a "
            f"{type(rope).__name__} whose result differs by {float(difference):.1e}"
        )
    _TABLES[rope] = made_of, table
    return table


def _read(original: nn.Module) -> LayerConfig:
    inside = "mlp.w12", "mlp.w3"
    if not hasattr(original.mlp, "w12"):
        inside = "mlp.fc1", "mlp.fc2"
    names = ("attn.qkv", "attn.proj", *inside)
    qkv, _, first, last = parts.projections(original, *names)
    (modulation,) = parts.projections(original, "adaLN_modulation.1")
    dim, hidden = qkv.in_features, last.in_features
    if modulation.out_features not in (4 * dim, 6 * dim):
        raise ValueError(
            f"adaLN_modulation.1 must have {4 * dim} or {6 * dim} rows, got "
            f"{modulation.out_features}"
        )
    mlp = "swiglu" if "mlp.w12" in inside else parts.gelu_of(original, "mlp.act")
    if first.out_features != (2 if mlp == "swiglu" else 1) * hidden:
        raise ValueError(f"{inside[0]} must have rows for {hidden}, got {first.out_features}")
    d = parts.head_width_of(original, "attn", "num_heads", qkv.out_features, 3)
    norm1, norm2 = parts.norms_of(original, "norm1", "norm2")
    qk_eps = parts.qk_eps_of(original, "attn.q_norm", "attn.k_norm")
    return LayerConfig(
        dim,
        original.attn.num_heads,
        hidden,
        modulation.in_features,
        norm=norm1.kind,
        mlp=mlp,
        qk_norm=qk_eps is not None,
        eps=norm1.eps,
        eps2=norm2.eps,
        qk_eps=LayerConfig.qk_eps if qk_eps is None else qk_eps,
        head_dim=d,
    )
