"""diffusers' BasicTransformerBlock with an adaptive norm and self-attention alone.

    ada_norm_zero      DiT: norm1 embeds step and class itself, norm1.linear modulates
    ada_norm_single    Latte's temporal layers: scale_shift_table + what the model made of the step

    attn1.to_q, to_k, to_v    one projection while the op runs
    attn1.to_out.0, ff.net.0.proj, ff.net.2

Peebles & Xie 2023 (arXiv:2212.09748); Chen et al. 2023 (arXiv:2310.00426), section 2.3.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dbkernels.convert.fused import parts
from dbkernels.convert.fused.layer import FusedLayer, check_no_dropout, check_signature, normal
from dbkernels.models.layer import LayerConfig, fold_norms
from dbkernels.ops import LayerWeights, adaln_layer, linear
from dbkernels.ops.layer.recompute import Recompute

_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
_PROJECTIONS = (*_QKV, "attn1.to_out.0", "ff.net.0.proj", "ff.net.2")
_SIGNATURE = (
    "hidden_states", "attention_mask", "encoder_hidden_states", "encoder_attention_mask",
    "timestep", "cross_attention_kwargs", "class_labels", "added_cond_kwargs",
)  # fmt: skip
# module of the two norms, by kind of block
_NORMS = {"ada_norm_zero": ("norm1.norm", "norm3"), "ada_norm_single": ("norm1", "norm2")}
_PROCESSORS = ("AttnProcessor", "AttnProcessor2_0")


class FusedBasicTransformerBlock(FusedLayer):
    """Called as the original, without masks; what else it ignores is ignored."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        check_signature(original, *_SIGNATURE)
        check_no_dropout(original)
        config = _read(original)
        norms = _NORMS[original.norm_type]
        reads = ["norm1", norms[1], "attn1", "ff"]
        if original.attn2 is not None:
            reads.append("attn2")
        super().__init__(original, recompute, tuple(reads), called=("norm1.emb",))
        self.config, self._norms = config, norms

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its class, without cross-attention."""
        kind = type(module)
        named = kind.__name__ == "BasicTransformerBlock" and kind.__module__[:10] == "diffusers."
        return named and module.attn2 is None

    def example(self, random: torch.Generator) -> Sequence[object]:
        """Hidden states (2, 4, D), with a variance that shows the eps of a norm, and the step."""
        x = 0.1 * normal(random, 2, 4, self.config.dim) + 0.2
        if self.norm_type == "ada_norm_single":
            return x, None, None, None, normal(random, 2, 6 * self.config.dim)
        step, label = torch.tensor([[3, 500], [0, 0]], dtype=torch.int64, device="cpu")
        return x, None, None, None, step, None, label

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict | None = None,
    ) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        self.check()
        self.check_given(attention_mask, cross_attention_kwargs)
        if torch.compiler.is_exporting():
            return self.original(hidden_states, timestep=timestep, class_labels=class_labels)
        modulation = self._modulation(hidden_states, timestep, class_labels)
        norms = (parts.affine_of(self.get_submodule(name)) for name in self._norms)
        return adaln_layer(
            hidden_states,
            fold_norms(modulation, *norms),
            self._weights(),
            recompute=self.recompute,
            **self.config.of_op(),
        )

    def check_given(self, mask: Tensor | None, of_processor: dict | None) -> None:
        """Refuse what the self-attention of no layer takes.

        Raises:
            ValueError: there is a mask, or something for its processor.
        """
        given = {"attention_mask": mask, "cross_attention_kwargs": of_processor or None}
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} must be None for a fused layer, got {type(value)}")

    def _modulation(self, x: Tensor, timestep: Tensor, class_labels: Tensor | None) -> Tensor:
        """(B, 6 D)."""
        if self.norm_type == "ada_norm_single":
            each = timestep.reshape(len(x), 6, -1)
            return (self.scale_shift_table[None] + each).flatten(1)
        embedded = self.norm1.emb(timestep, class_labels, hidden_dtype=x.dtype)
        return linear(F.silu(embedded), self.norm1.linear.weight, self.norm1.linear.bias)

    def _weights(self) -> LayerWeights:
        attn, ff = self.attn1, self.ff.net
        qkv = parts.stacked([attn.to_q, attn.to_k, attn.to_v], None)
        others = (attn.to_out[0], ff[0].proj, ff[2])
        return LayerWeights(*qkv, *(p for each in others for p in (each.weight, each.bias)))


def _read(original: nn.Module) -> LayerConfig:
    if original.norm_type not in _NORMS:
        raise ValueError(f"norm_type must be one of {', '.join(_NORMS)}, got {original.norm_type}")
    if original.pos_embed is not None:
        raise ValueError(f"pos_embed must be None, got {original.pos_embed}")
    q, k, v, _, _, last = parts.projections(original, *_PROJECTIONS)
    attn = original.attn1
    for name in ("attn1", "attn2"):
        each = getattr(original, name)
        processor = None if each is None else type(each.processor).__name__
        if each is not None and processor not in _PROCESSORS:
            raise ValueError(
                f"{name}.processor must be one of {', '.join(_PROCESSORS)}, got {processor}"
            )
    if len({linear.bias is None for linear in (q, k, v)}) > 1:
        raise ValueError(f"all of {', '.join(_QKV)} must have a bias or none, got some")
    if (widths := {linear.out_features for linear in (q, k, v)}) != {q.out_features}:
        raise ValueError(f"{', '.join(_QKV)} must be of one width, got {sorted(widths)}")
    if original.norm_type == "ada_norm_zero":
        parts.projections(original, "norm1.linear")
        parts.part(original, "norm1.emb")
    norm1, norm2 = parts.norms_of(original, *_NORMS[original.norm_type])
    return LayerConfig(
        original.dim,
        attn.heads,
        last.in_features,
        cond_dim=0,
        mlp=parts.gelu_of(original, "ff.net.0"),
        eps=norm1.eps,
        eps2=norm2.eps,
        head_dim=parts.head_width_of(original, "attn1", "heads", q.out_features, 1),
    )
