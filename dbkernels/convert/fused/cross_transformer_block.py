"""diffusers' BasicTransformerBlock with cross-attention, as PixArt has it.

    ada_norm_single    scale_shift_table + what the model made of the step
    attn2.to_q         reads the stream without a norm
    attn2.to_k, to_v   of the text, one projection while the op runs

Chen et al. 2023 (arXiv:2310.00426), section 2.3. A mask of the text is taken where it leaves each
sample its first tokens; any other is refused.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dbkernels.convert.fused import parts
from dbkernels.convert.fused.basic_transformer_block import FusedBasicTransformerBlock
from dbkernels.convert.fused.layer import normal
from dbkernels.models.layer import fold_norms
from dbkernels.ops import LayerWeights, cross_layer
from dbkernels.ops.layer.recompute import Recompute

_CROSS = ("attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0")
_CLOSED = -10000.0  # what a model adds to the scores of a token that is no key, or less


class FusedCrossTransformerBlock(FusedBasicTransformerBlock):
    """Called as the original, with the mask of a text's length or without."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        if original.norm_type != "ada_norm_single":
            raise ValueError(
                f"norm_type must be ada_norm_single with cross-attention, got {original.norm_type}"
            )
        _check_cross(original)
        super().__init__(original, recompute)
        if (eps2 := self.config.eps2) != self.config.eps:
            raise ValueError(f"norm2.eps must be that of norm1, {self.config.eps}, got {eps2}")

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its class, with cross-attention."""
        kind = type(module)
        named = kind.__name__ == "BasicTransformerBlock" and kind.__module__[:10] == "diffusers."
        return named and module.attn2 is not None

    def example(self, random: torch.Generator) -> Sequence[object]:
        """Hidden states (2, 4, D), with a variance that shows the eps of a norm, a text of which
        one sample has less, and the step."""
        x = 0.1 * normal(random, 2, 4, self.config.dim) + 0.2
        context = normal(random, 2, 3, self.attn2.to_k.in_features)
        mask = torch.tensor([[[0.0, 0.0, 0.0]], [[0.0, 0.0, _CLOSED]]], dtype=torch.float64)
        return x, None, context, mask, normal(random, 2, 6 * self.config.dim)

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
        """(B, T, D) and the text (B, S, C) -> (B, T, D)."""
        self.check()
        self.check_given(attention_mask, cross_attention_kwargs)
        if encoder_hidden_states is None:
            raise ValueError("encoder_hidden_states must be given to a fused layer, got None")
        lengths = None
        if encoder_attention_mask is not None:
            lengths = lengths_of(encoder_attention_mask, encoder_hidden_states)
        if torch.compiler.is_exporting():
            return self.original(
                hidden_states,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=timestep,
            )
        modulation = self._modulation(hidden_states, timestep, class_labels)
        norms = (parts.affine_of(self.get_submodule(name)) for name in self._norms)
        told = self.config.of_op()
        told.pop("eps2")
        return cross_layer(
            hidden_states,
            fold_norms(modulation, *norms),
            encoder_hidden_states,
            self._weights(),
            lengths=lengths,
            recompute=self.recompute,
            **told,
        )

    def _weights(self) -> LayerWeights:
        attn, weights = self.attn2, super()._weights()
        kv_weight, kv_bias = parts.stacked([attn.to_k, attn.to_v], None)
        return weights._replace(
            cross_q_weight=attn.to_q.weight,
            cross_q_bias=attn.to_q.bias,
            cross_kv_weight=kv_weight,
            cross_kv_bias=kv_bias,
            cross_out_weight=attn.to_out[0].weight,
            cross_out_bias=attn.to_out[0].bias,
        )


class _Read(NamedTuple):
    version: int
    lengths: Tensor


_LENGTHS = WeakIdKeyDictionary()  # of each mask, which all layers of a model are given


@torch.compiler.disable
def lengths_of(mask: Tensor, context: Tensor) -> Tensor:
    """How many of its first tokens a mask leaves to each sample, (B,); read once for a mask.

    Args:
        mask:     (B, 1, S)  what is added to the scores: 0, or _CLOSED or less; or whether a token
                  is a key
        context:  (B, S, C)
    Raises:
        ValueError: it has another shape or other numbers, leaves later tokens without all before
            them, or leaves a sample none.
    """
    B, S = context.shape[:2]
    told = mask.dtype == torch.bool
    if mask.shape != (B, 1, S) or not (told or mask.is_floating_point()):
        raise ValueError(
            f"encoder_attention_mask must be (B, 1, S) = ({B}, 1, {S}) of floats or of bool, got "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
    read = _LENGTHS.get(mask)
    if read is None or read.version != mask._version:
        rows = mask.detach()[:, 0]
        seen = rows if told else rows == 0
        closed = ~rows if told else rows <= _CLOSED
        lengths = seen.sum(1)
        first = torch.arange(S, device=mask.device) < lengths[:, None]
        fits = torch.where(seen, first, ~first & closed).all() & (lengths > 0).all()
        if not bool(fits):
            raise ValueError(
                "encoder_attention_mask must leave each sample its first tokens, at least one, by "
                f"0, and close the others by {_CLOSED} or less, got another one"
            )
        read = _LENGTHS[mask] = _Read(mask._version, lengths)
    return read.lengths


def _check_cross(original: nn.Module) -> None:
    q, k, v, _ = parts.projections(original, *_CROSS, "attn1.to_q")[:4]
    attn1, attn2 = original.attn1, original.attn2
    if (k.bias is None) != (v.bias is None):
        raise ValueError("attn2.to_k and attn2.to_v must have a bias or none, got one")
    widths = {linear.out_features for linear in (q, k, v)} | {attn1.to_q.out_features}
    if len(widths) > 1 or attn2.heads != attn1.heads:
        raise ValueError(
            f"attn2 must have the heads of attn1, {attn1.heads} of together "
            f"{attn1.to_q.out_features}, got {attn2.heads} of {sorted(widths)}"
        )
