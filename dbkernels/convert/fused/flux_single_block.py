"""diffusers' FluxSingleTransformerBlock: attention and MLP side by side, over text and image.

    norm.linear, norm.norm           modulation (3 D) and the norm
    attn.to_q, to_k, to_v            one projection while the op runs
    proj_mlp, act_mlp, proj_out      of proj_out the first columns read the attention

Positions turn neighbours; so where there are any, rows of queries and keys are permuted.
"""

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
from dbkernels.convert.fused.neighbour_table import neighbour_table
from dbkernels.convert.pairing import qkv_by_halves
from dbkernels.models.parallel_layer import ParallelConfig
from dbkernels.ops import LayerWeights, linear, parallel_layer
from dbkernels.ops.layer.recompute import Recompute

_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_PROJECTIONS = (*_QKV, "proj_mlp", "proj_out")
_SIGNATURE = (
    "hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs",
)  # fmt: skip
_PROCESSOR = "FluxAttnProcessor"
_FLOAT16_MAX = 65504


class FusedFluxSingleBlock(FusedLayer):
    """Called as the original, without anything for its attention's processor."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        check_signature(original, *_SIGNATURE)
        check_no_dropout(original)
        config = _read(original)
        super().__init__(original, recompute, ("norm", "proj_mlp", "act_mlp", "proj_out", "attn"))
        self.config = config
        self._rows = qkv_by_halves(config.head_dim, config.num_heads)

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its class."""
        kind = type(module)
        named = kind.__name__ == "FluxSingleTransformerBlock"
        return named and kind.__module__.startswith("diffusers.")

    def example(self, random: torch.Generator) -> Sequence[object]:
        """Image (2, 3, D) and text (2, 2, D), with a variance that shows the eps of the norm; the
        condition, and positions."""
        config = self.config
        image, text = (0.1 * normal(random, 2, count, config.dim) + 0.2 for count in (3, 2))
        angles = normal(random, 5, config.head_dim // 2).repeat_interleave(2, dim=-1)
        rotary = angles.cos().float(), angles.sin().float()
        return image, text, normal(random, 2, config.cond_dim), rotary

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, T, D) of the image and (B, S, D) of the text -> those of the text and the image."""
        self.check()
        if joint_attention_kwargs:
            raise ValueError(
                "joint_attention_kwargs must be None for a fused layer, got "
                f"{', '.join(map(str, joint_attention_kwargs))}"
            )
        if torch.compiler.is_exporting():
            return self.original(hidden_states, encoder_hidden_states, temb, image_rotary_emb)
        x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        table, order = None, None
        if image_rotary_emb is not None:
            table, order = neighbour_table(*image_rotary_emb, x.device), self._order(x.device)
        projection = self.norm.linear
        temb = of_each_sample(x, temb)
        out = parallel_layer(
            x,
            linear(F.silu(temb), projection.weight, projection.bias),
            self._weights(order),
            rotary=table,
            recompute=self.recompute,
            **self.config.of_op(),
        )
        if out.dtype == torch.float16:
            out = out.clip(-_FLOAT16_MAX, _FLOAT16_MAX)  # as the original does
        count = encoder_hidden_states.shape[1]
        return out[:, :count], out[:, count:]

    def _order(self, device: torch.device) -> Tensor:
        """Of the rows of q, k and v, where positions turn queries and keys."""
        if self._rows.device != device:
            self._rows = self._rows.to(device)
        return self._rows

    def _weights(self, order: Tensor | None) -> LayerWeights:
        attn, config = self.attn, self.config
        columns = [config.attention_width, config.mlp_hidden]
        # views, whose gradients are put together as they come
        of_attention, of_mlp = self.proj_out.weight.split(columns, dim=1)
        norms = attn.norm_q.weight, attn.norm_k.weight
        if order is not None:
            # of the first head, which are those of any
            norms = [weight[order[: config.head_dim]] for weight in norms]
        return LayerWeights(
            *parts.stacked([attn.to_q, attn.to_k, attn.to_v], order),
            of_attention,
            None,
            self.proj_mlp.weight,
            self.proj_mlp.bias,
            of_mlp,
            self.proj_out.bias,
            *norms,
        )


def _read(original: nn.Module) -> ParallelConfig:
    q, k, v, first, last = parts.projections(original, *_PROJECTIONS)
    attn, norm = original.attn, parts.norm_of(original, "norm.norm")
    if (processor := type(attn.processor).__name__) != _PROCESSOR:
        raise ValueError(f"attn.processor must be a {_PROCESSOR}, got {processor}")
    if parts.affine_of(original.norm.norm)[0] is not None:
        raise ValueError("norm.norm must have no weight, got one")
    if len({each.bias is None for each in (q, k, v)}) > 1:
        raise ValueError(f"all of {', '.join(_QKV)} must have a bias or none, got some")
    (modulation,) = parts.projections(original, "norm.linear")
    qk_eps = parts.qk_eps_of(original, "attn.norm_q", "attn.norm_k")
    if qk_eps is None:
        raise ValueError("attn.norm_q and attn.norm_k must be RMS norms, got none")
    d = parts.head_width_of(original, "attn", "heads", q.out_features, 1)
    for name, linear_, width in (
        ("attn.to_k", k, q.out_features),
        ("attn.to_v", v, q.out_features),
        ("norm.linear", modulation, 3 * q.in_features),
    ):
        if linear_.out_features != width:
            raise ValueError(f"{name} must have {width} outputs, got {linear_.out_features}")
    if last.in_features != q.out_features + first.out_features:
        raise ValueError(
            f"proj_out must read {q.out_features} + {first.out_features} numbers, got "
            f"{last.in_features}"
        )
    return ParallelConfig(
        q.in_features,
        attn.heads,
        first.out_features,
        modulation.in_features,
        norm=norm.kind,
        mlp=parts.gelu_of(original, "act_mlp"),
        qk_norm=True,
        eps=norm.eps,
        qk_eps=qk_eps,
        head_dim=d,
    )
