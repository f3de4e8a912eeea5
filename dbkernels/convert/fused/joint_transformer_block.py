"""diffusers' JointTransformerBlock: the layer of SD3 and SD3.5, also with a second attention, and
the last one, whose context is only keys and values.

Esser et al. 2024 (arXiv:2403.03206), section 4.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dbkernels.convert.fused.layer import check_signature
from dbkernels.convert.fused.two_streams import FusedTwoStreams
from dbkernels.ops.layer.recompute import Recompute

_SIGNATURE = ("hidden_states", "encoder_hidden_states", "temb", "joint_attention_kwargs")


class FusedJointTransformerBlock(FusedTwoStreams):
    """Called as the original, without settings of its attention."""

    def __init__(self, original: nn.Module, recompute: Recompute):
        check_signature(original, *_SIGNATURE)
        super().__init__(original, recompute, ("JointAttnProcessor2_0",))

    @staticmethod
    def knows(module: nn.Module) -> bool:
        """By its class."""
        kind = type(module)
        return kind.__name__ == "JointTransformerBlock" and kind.__module__[:10] == "diffusers."

    def example(self, random: torch.Generator) -> Sequence[object]:
        """Both streams and the condition."""
        return self.streams(random)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        joint_attention_kwargs: dict | None = None,
    ) -> tuple[Tensor | None, Tensor]:
        """(B, S, D), (B, T, D) and (B, cond_dim) -> (B, T, D) or None, and (B, S, D)."""
        self.check()
        if joint_attention_kwargs:
            raise ValueError(
                f"joint_attention_kwargs must be empty for a fused layer, got "
                f"{', '.join(joint_attention_kwargs)}"
            )
        if torch.compiler.is_exporting():
            return self.original(hidden_states, encoder_hidden_states, temb)
        x, context = self.run_op(hidden_states, encoder_hidden_states, temb)
        return context, x
