"""One call of an AdaLN layer: its forward, and its backward from whatever the policy kept."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend.register import runs_as_on_gpu
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer import branches
from dbkernels.ops.layer.projection import QKV, Gradients, as_rows, chunks, project
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.tensors import (
    Activations,
    LayerModulation,
    LayerOptions,
    LayerWeights,
    by_sample,
    first_tokens,
)

PART = 4096  # tokens of the samples that run at a time: what they need is little beside the stream
GPU_PART = 8192  # where only q, k, v and hidden are made again, whose peak is no higher for it
NOTHING = Activations(*(None for _ in Activations._fields))


class LayerCall(NamedTuple):
    """A layer and what goes in; weights have the dtype of the branches, x that of the stream."""

    x: Tensor
    """(B, T, D); in a backward it may be narrower than the stream."""
    modulation: Tensor
    """(samples, 6 D); a token is a sample where each has a condition of its own."""
    rotary: Tensor | None
    """(2, T, D / H)"""
    weights: LayerWeights
    options: LayerOptions

    @property
    def mod(self) -> LayerModulation:
        return LayerModulation.of(self.modulation)

    def by_sample(self, t: Tensor) -> Tensor:
        return by_sample(t, len(self.modulation))

    def first(self) -> "LayerCall":
        """The tokens whose result is wanted, (B, N, D), for all that follows the attention."""
        B, T, _ = self.x.shape
        N, modulation = self.options.num_queries, self.modulation
        if N is None:
            return self
        if len(modulation) != B:
            modulation = as_rows(first_tokens(modulation.view(B, T, -1), N))
        return self._replace(x=first_tokens(self.x, N), modulation=modulation)

    def forward(self) -> tuple[Tensor, Activations]:
        """The layer's output (B, N, D), and its activations; without hidden if the policy says so.

        A policy that keeps nothing has no activations, and runs a few samples at a time.
        """
        B, T, D = self.x.shape
        out = self.x.new_empty((B, self.options.num_queries or T, D))
        if POLICIES[self.options.recompute].keeps:
            return out, self._write(out)
        for samples, call in self._parts(self.x.dtype, PART):
            call._write(out[samples])
        return out, NOTHING

    def narrowed(self) -> Tensor:
        """x in the dtype of the branches, less what a norm subtracts; x itself if that is no less.

        Around a mean that is large beside the rest, x would lose what the norm makes of it.
        """
        x, norm = self.x, self.options.norm
        if norm.dtype.itemsize >= x.dtype.itemsize:
            return x
        kept = torch.empty_like(x, dtype=norm.dtype)
        for samples, call in self._parts(x.dtype, PART):
            each = call.x
            kept[samples] = each - each.mean(-1, keepdim=True) if norm.centred else each
        return kept

    def _write(self, out: Tensor) -> Activations:
        w, options, first = self.weights, self.options, self.first()
        y, stats1 = self.first_norm()
        qkv = QKV.of(y, w, options.num_queries)
        attended, logsumexp = branches.attend(qkv, options.num_heads, w, self.rotary)
        a = project(attended, w.out_weight, w.out_bias)

        # nothing else sees x1, so the layer's output takes its place
        x1, hidden = first.by_sample(out), None
        y, stats2 = first.second_norm(a, x1=x1)
        if "hidden" in POLICIES[options.recompute].keeps:
            hidden = y.new_empty((len(as_rows(y)), len(w.fc1_weight)))
        m = branches.mlp(y, options.mlp, w, hidden=hidden)
        gated_residual_forward(x1, first.by_sample(m), first.mod.gate2, y=x1)
        return Activations(stats1, *qkv, attended, logsumexp, a, stats2, hidden, m)

    def first_norm(self) -> tuple[Tensor, Tensor]:
        """y1 (B, T, D) and its statistics."""
        mod, x = self.mod, self.by_sample(self.x)
        y, stats = adaln_norm_forward(self.options.norm, x, mod.scale1, mod.shift1)
        return y.view(self.x.shape), stats

    def second_norm(self, a: Tensor, *, x1: Tensor | None) -> tuple[Tensor, Tensor]:
        """y2 (B, T, D) and its statistics; writes x1 where it is given."""
        x, a = map(self.by_sample, (self.x, a))
        y, stats = gated_adaln_norm_forward(self.options.norm, x, a, *self.mod.between, x1)
        return y.view(self.x.shape), stats

    def backward(self, dout: Tensor, kept: "Kept", gradients: Gradients) -> tuple[Tensor, Tensor]:
        """dx (B, T, D) and dmodulation (samples, 6 D).

        kept is emptied as it is used up. Without q, k and v, which the widest tensors of the
        attention's backward are made from, a few samples run at a time.
        """
        if kept["qkv"] is not None:
            return self._gradients(dout, kept, gradients)
        dx = torch.empty_like(self.x, dtype=dout.dtype)
        dmodulation = torch.empty_like(self.modulation)
        size = GPU_PART if kept["a"] is not None and runs_as_on_gpu(dout) else PART
        gradients.parts = max(size // max(self.x.shape[1], 1), 1) < len(self.x)
        for samples, call in self._parts(dout.dtype, size):
            own = {name: _part(t, samples, len(self.x)) for name, t in kept.items()}
            own = Kept(own, owned=kept.owned)
            if own["a"] is None:
                call = call._replace(options=self.options._replace(recompute="none"))
                own = Kept(call.forward()[1]._asdict(), owned=True)
            dmod = _part(dmodulation, samples, len(self.x))
            dx[samples], dmod[:] = call._gradients(dout[samples], own, gradients)
        kept.clear()
        return dx, dmodulation

    def _parts(self, dtype: torch.dtype, tokens: int) -> Iterator[tuple[slice, "LayerCall"]]:
        """Calls of a few samples each, one after another, with x in the dtype of the stream."""
        B, T, _ = self.x.shape
        for samples in chunks(B, max(tokens // max(T, 1), 1)):
            modulation = _part(self.modulation, samples, len(self.x))
            yield samples, self._replace(x=self.x[samples].to(dtype), modulation=modulation)

    def _gradients(self, dout: Tensor, kept: "Kept", gradients: Gradients) -> tuple[Tensor, Tensor]:
        first, dmodulation = self.first(), torch.empty_like(self.modulation)
        shared = first.modulation is self.modulation
        dfirst = dmodulation if shared else torch.empty_like(first.modulation)
        dx1, da = first._mlp_backward(dout, kept, dfirst, gradients)
        dx = self._attention_backward(da, dx1, kept, dmodulation, gradients)
        if not shared:
            _write_first(dmodulation, dfirst, self.x.shape)
        return dx, dmodulation

    def _mlp_backward(
        self, dout: Tensor, kept: "Kept", dmodulation: Tensor, gradients: Gradients
    ) -> tuple[Tensor, Tensor]:
        """dx1, by sample, and da (B, T, D)."""
        a, m, hidden, y, dhidden = kept.pop("a"), kept.pop("m"), kept.pop("hidden"), None, None
        mod, dmod = self.mod, LayerModulation.of(dmodulation)
        x, dout, dm = self.by_sample(self.x), self.by_sample(dout), kept.buffer(m)
        gated_residual_backward(
            dout, self.by_sample(m), mod.gate2, dh=self.by_sample(dm), dgate=dmod.gate2
        )
        if hidden is None:
            y, _ = self.second_norm(a, x1=None)
        else:
            dhidden = kept.buffer(hidden)
        dy = branches.mlp_backward(
            dm, y, hidden, self.options.mlp, self.weights, dhidden=dhidden, gradients=gradients
        )
        del m, dm, y
        da, dy_rows, dx1 = kept.buffer(a), self.by_sample(dy), torch.empty_like(x)
        gated_adaln_norm_backward(
            dy_rows, dout, x, self.by_sample(a), *mod.between, kept.pop("stats2"),
            dx1, self.by_sample(da), None if hidden is None else dy_rows, *dmod.between,
            self.options.norm.centred,
        )  # fmt: skip
        if hidden is not None:
            gradients.add_weight("fc1", dhidden, dy)  # y is written over dy by now
        return dx1, da

    def _attention_backward(
        self, da: Tensor, dx1: Tensor, kept: "Kept", dmodulation: Tensor, gradients: Gradients
    ) -> Tensor:
        """dx (B, T, D)."""
        w, N = self.weights, self.options.num_queries
        mod, dmod = self.mod, LayerModulation.of(dmodulation)
        qkv = QKV(kept.pop("q"), kept.pop("qkv"))
        if qkv.qkv is None:
            qkv, kept.owned = QKV.of(self.first_norm()[0], w, N), True
        # the norm of queries and keys reads qkv after dqkv has been written
        dqkv = QKV(*(kept.buffer(t) if w.q_weight is None else _like(t) for t in qkv))
        attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
        branches.attend_backward(
            da, qkv, attended, logsumexp, self.options.num_heads, w, self.rotary,
            dqkv=dqkv, gradients=gradients,
        )  # fmt: skip
        del attended
        dy = dqkv.backward(w)
        dy_rows, dx1_rows = self.by_sample(dy), dx1 if N is None else None
        x, dx = self.by_sample(self.x), torch.empty_like(self.x)
        adaln_norm_backward(
            dy_rows, dx1_rows, x, mod.scale1, mod.shift1, kept.pop("stats1"),
            self.by_sample(dx), dy_rows, dmod.scale1, dmod.shift1, self.options.norm.centred,
        )  # fmt: skip
        dqkv.add_to(gradients, dy)  # y is written over dy by now
        if N is not None:
            dx[:, :N] += dx1.view(len(dx), N, dx.shape[-1])
        return dx


def _part(tensor: Tensor | None, samples: slice, B: int) -> Tensor | None:
    """Some samples of a tensor that has a row, or several, for each of B."""
    if tensor is None:
        return None
    each = len(tensor) // max(B, 1)
    return tensor[samples.start * each : samples.stop * each]


def _write_first(dmodulation: Tensor, dfirst: Tensor, shape: torch.Size) -> None:
    """What follows the attention, of the first tokens; the others feel nothing of it."""
    B, T, D = shape
    after = dmodulation.view(B, T, 6 * D)[..., 2 * D :]
    after.zero_()
    dfirst = dfirst.view(B, len(dfirst) // B, 6 * D)
    after[:, : dfirst.shape[1]] = dfirst[..., 2 * D :]


class Kept(dict[str, Tensor | None]):
    """What a forward kept, by the names of `Activations`.

    What is owned is written over: no one reads it after this.
    """

    def __init__(self, tensors: dict[str, Tensor | None], *, owned: bool):
        super().__init__(tensors)
        self.owned = owned

    def buffer(self, tensor: Tensor | None) -> Tensor | None:
        """Where a gradient of this shape goes: over the tensor itself, if it may."""
        if tensor is None or not self.owned:
            return _like(tensor)
        # whoever else had saved it is told, instead of reading a gradient for an activation
        torch.autograd.graph.increment_version(tensor)
        return tensor


def _like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)
