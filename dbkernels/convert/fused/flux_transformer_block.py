"""diffusers' FluxTransformerBlock: the layer of two streams of Flux, with rotary positions over
both, the context's first, that turn pairs of neighbours.

The rows of queries and keys are put in the order of halves while the op runs.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from dbkernels.convert.fused.layer import check_signature, normal
from dbkernels.convert.fused.two_streams import FusedTwoStreams
from dbkernels.convert.pairing import qkv_by_halves, table_by_halves
from dbkernels.ops.layer.recompute import Recompute

_SIGNATURE = (
    "hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "joint_attention_kwargs"
)  # fmt: skip
# of the cosines that all layers of a network are given: the sines, their versions, and the table
_TABLES = WeakIdKeyDictionary()


class FusedFluxTransformerBlock(FusedTwoStreams):
    """Called as the original, without settings of its attention."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        check_signature(original, *_SIGNATURE)
        super().__init__(original, recompute, ("FluxAttnProcessor",))
        d = self.config.head_dim
        self._rows = None if d % 2 else qkv_by_halves(d, self.config.num_heads)

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its class."""
        kind = type(module)
        return kind.__name__ == "FluxTransformerBlock" and kind.__module__[:10] == "diffusers."

    def example(self, random: torch.Generator) -> Sequence[object]:
        """Both streams, the condition, and positions."""
        d, positions = self.config.head_dim, None
        if d % 2 == 0:
            angles = normal(random, 7, d // 2).repeat_interleave(2, dim=-1)
            positions = angles.cos().float(), angles.sin().float()
        return *self.streams(random), positions

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor, Tensor]:
        """(B, S, D), (B, T, D), (B, cond_dim) and (T + S, d) twice -> (B, T, D) and (B, S, D)."""
        self.check()
        if joint_attention_kwargs:
            raise ValueError(
                f"joint_attention_kwargs must be empty for a fused layer, got "
                f"{', '.join(joint_attention_kwargs)}"
            )
        given = hidden_states, encoder_hidden_states, temb
        if torch.compiler.is_exporting():
            return self.original(*given, image_rotary_emb)
        rotary = order = None
        if image_rotary_emb is not None:
            rotary, order = table_of(*image_rotary_emb, given[0].device), self._order(given[0])
        x, context = self.run_op(*given, rotary, order)
        if context.dtype == torch.float16:  # as the original, whose largest tokens overflow
            context = context.clip(-65504, 65504)
        return context, x

    def _order(self, x: Tensor) -> Tensor:
        """Of the rows of queries, keys and values."""
        if self._rows is None:
            raise ValueError(
                f"image_rotary_emb must be None for heads of an odd width, {self.config.head_dim}"
            )
        if self._rows.device != x.device:
            self._rows = self._rows.to(x.device)
        return self._rows


@torch.compiler.disable
def table_of(cos: Tensor, sin: Tensor, device: torch.device) -> Tensor:
    """The table of an op, made and checked once for all layers that are given the same tensors.

    Args:
        cos, sin:  (T, d), the elements of a pair of neighbours equal
        device:    of the table
    Returns:
        (2, T, d) float32.
    Raises:
        ValueError: a shape is another one, or a pair has two angles.
    """
    told = sin, cos._version, sin._version, device
    known = _TABLES.get(cos)
    if known is not None and known[0] is sin and known[1:4] == told[1:]:
        return known[4]
    table = table_by_halves(cos, sin).to(device)
    _TABLES[cos] = (*told, table)
    return table
