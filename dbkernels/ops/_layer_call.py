"""One call of an AdaLN layer: its forward, and its backward from whatever the rung kept."""

from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops._attention_branch import attend, attention_branch_backward
from dbkernels.ops._layer_tensors import Activations, LayerModulation, LayerOptions, LayerWeights
from dbkernels.ops._mlp_branch import mlp_branch, mlp_branch_backward
from dbkernels.ops._projection import Gradients, as_rows, project
from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.rung import RUNGS
from dbkernels.ops.stream import by_sample


class LayerCall(NamedTuple):
    """A layer and what goes in; weights have the dtype of the branches, x that of the stream."""

    x: Tensor
    """(B, T, D)"""
    modulation: Tensor
    """(samples, 6 D); a token is a sample where each has a condition of its own."""
    rotary: Tensor | None
    """(2, T, D / H)"""
    weights: LayerWeights
    options: LayerOptions

    @property
    def mod(self) -> LayerModulation:
        return LayerModulation(*self.modulation.chunk(6, dim=-1))

    def by_sample(self, t: Tensor) -> Tensor:
        return by_sample(t, len(self.modulation))

    def forward(self) -> tuple[Tensor, Activations]:
        """The layer's output (B, T, D), and its activations; without hidden if the rung says so."""
        x, w, mod, options = self.x, self.weights, self.mod, self.options
        y, stats1 = self.first_norm()
        qkv = project(y, w.qkv_weight, w.qkv_bias)
        attended, logsumexp = attend(qkv, options.heads, w, self.rotary)
        a = project(attended, w.out_weight, w.out_bias)

        x1, hidden = torch.empty_like(x), None
        y, stats2 = self.second_norm(a, x1=self.by_sample(x1))
        if "hidden" in RUNGS[options.keep].keeps:
            hidden = y.new_empty((len(as_rows(y)), len(w.fc1_weight)))
        m = mlp_branch(y, options.mlp, w, hidden=hidden)
        # nothing else sees x1, so the layer's output takes its place
        out = self.by_sample(x1)
        gated_residual_forward(out, self.by_sample(m), mod.gate2, y=out)
        return x1, Activations(stats1, qkv, attended, logsumexp, a, stats2, hidden, m)

    def first_norm(self) -> tuple[Tensor, Tensor]:
        """y1 (B, T, D) and its statistics."""
        y, stats = adaln_norm_forward(
            self.by_sample(self.x), self.mod.scale1, self.mod.shift1, self.options.norm
        )
        return y.view(self.x.shape), stats

    def second_norm(self, a: Tensor, *, x1: Tensor | None) -> tuple[Tensor, Tensor]:
        """y2 (B, T, D) and its statistics; writes x1 where it is given."""
        y, stats = gated_adaln_norm_forward(
            self.by_sample(self.x), self.by_sample(a), self.mod.between, self.options.norm, x1=x1
        )
        return y.view(self.x.shape), stats

    def backward(
        self, dout: Tensor, kept: Activations, gradients: Gradients, *, owned: bool
    ) -> tuple[Tensor, Tensor]:
        """dx (B, T, D) and dmodulation (samples, 6 D).

        What is owned is written over: no one reads the activations after this.
        """
        if kept.a is None:
            call = self._replace(options=self.options._replace(keep="none"))
            kept, owned = call.forward()[1], True
        dmodulation = torch.empty_like(self.modulation)
        dmod = LayerModulation(*dmodulation.chunk(6, dim=-1))
        dm = _buffer(kept.m, owned)
        gated_residual_backward(
            *map(self.by_sample, (dout, kept.m)),
            self.mod.gate2,
            dh=self.by_sample(dm),
            dgate=dmod.gate2,
        )
        dx1, da = self._mlp_backward(dm, dout, kept, dmod, gradients, owned=owned)
        dx = self._attention_backward(da, dx1, kept, dmod, gradients, owned=owned)
        return dx.view(self.x.shape), dmodulation

    def _mlp_backward(
        self,
        dm: Tensor,
        dout: Tensor,
        kept: Activations,
        dmod: LayerModulation,
        gradients: Gradients,
        *,
        owned: bool,
    ) -> tuple[Tensor, Tensor]:
        """dx1, by sample, and da (B, T, D)."""
        hidden, y, dhidden = kept.hidden, None, None
        if hidden is None:
            y, _ = self.second_norm(kept.a, x1=None)
        else:
            dhidden = _buffer(hidden, owned)
        dy = mlp_branch_backward(
            dm, y, hidden, self.options.mlp, self.weights, dhidden=dhidden, gradients=gradients
        )
        da = _buffer(kept.a, owned)
        dx1 = gated_adaln_norm_backward(
            *map(self.by_sample, (dy, dout, self.x, kept.a)),
            self.mod.between,
            kept.stats2,
            self.options.norm,
            dh=self.by_sample(da),
            y=None if hidden is None else self.by_sample(dy),
            dmodulation=dmod.between,
        )
        if hidden is not None:
            gradients.add_weight("fc1", dhidden, dy)  # y is written over dy by now
        return dx1, da

    def _attention_backward(
        self,
        da: Tensor,
        dx1: Tensor,
        kept: Activations,
        dmod: LayerModulation,
        gradients: Gradients,
        *,
        owned: bool,
    ) -> Tensor:
        """dx, by sample."""
        w, qkv = self.weights, kept.qkv
        if qkv is None:
            qkv, owned = project(self.first_norm()[0], w.qkv_weight, w.qkv_bias), True
        # the norm of queries and keys reads qkv after dqkv has been written
        dqkv = _buffer(qkv, owned and w.q_weight is None)
        attention_branch_backward(
            da, qkv, kept.attended, kept.logsumexp, self.options.heads, w, self.rotary,
            dqkv=dqkv, gradients=gradients,
        )  # fmt: skip
        dy = project(dqkv, w.qkv_weight.T)
        dx = adaln_norm_backward(
            self.by_sample(dy),
            dx1,
            self.by_sample(self.x),
            self.mod.scale1,
            self.mod.shift1,
            kept.stats1,
            self.options.norm,
            y=self.by_sample(dy),
            dscale=dmod.scale1,
            dshift=dmod.shift1,
        )
        gradients.add_projection("qkv", dqkv, dy)  # y is written over dy by now
        return dx


def _buffer(tensor: Tensor, owned: bool) -> Tensor:
    """Where a gradient of this shape goes: over the tensor itself, if it may."""
    if not owned:
        return torch.empty_like(tensor)
    # whoever else had saved it is told, instead of reading a gradient for an activation
    torch.autograd.graph.increment_version(tensor)
    return tensor
