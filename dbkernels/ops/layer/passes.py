"""One call of an AdaLN layer: its forward, and its backward from whatever the policy kept."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import adaln_norm_backward, adaln_norm_forward
from dbkernels.ops.backend.dry_run_device import runs_as_on_gpu
from dbkernels.ops.gated_adaln_norm import gated_adaln_norm_backward, gated_adaln_norm_forward
from dbkernels.ops.gated_residual import gated_residual_backward, gated_residual_forward
from dbkernels.ops.layer.attention_branch import attend, attention_branch_backward
from dbkernels.ops.layer.first_tokens import first_tokens
from dbkernels.ops.layer.mlp_branch import mlp_branch, mlp_branch_backward
from dbkernels.ops.layer.projection import Gradients, as_rows, chunks, project
from dbkernels.ops.layer.qkv import QKV, add_qkv, project_qkv, project_qkv_backward
from dbkernels.ops.layer.recompute import POLICIES
from dbkernels.ops.layer.stream import by_sample
from dbkernels.ops.layer.tensors import Activations, LayerModulation, LayerOptions, LayerWeights

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
        out, activations = self.x.new_empty((B, self.options.num_queries or T, D)), NOTHING
        if POLICIES[self.options.recompute].keeps:
            activations = self._write(out)
        else:
            for part in self._parts(self.x.dtype, PART):
                part.call._write(out[part.samples])
        return out, activations

    def narrowed(self) -> Tensor:
        """x in the dtype of the branches, less what a norm subtracts; x itself if that is no less.

        Around a mean that is large beside the rest, x would lose what the norm makes of it.
        """
        x, norm = self.x, self.options.norm
        if norm.dtype.itemsize >= x.dtype.itemsize:
            return x
        kept = torch.empty_like(x, dtype=norm.dtype)
        for part in self._parts(x.dtype, PART):
            each = part.call.x
            kept[part.samples] = each - each.mean(-1, keepdim=True) if norm.centred else each
        return kept

    def _write(self, out: Tensor) -> Activations:
        w, options, first = self.weights, self.options, self.first()
        y, stats1 = self.first_norm(_by_name(self.modulation))
        qkv = project_qkv(y, w, options.num_queries)
        attended, logsumexp = attend(qkv, options.num_heads, w, self.rotary)
        a = project(attended, w.out_weight, w.out_bias)

        # nothing else sees x1, so the layer's output takes its place
        x1, hidden, mod = first.by_sample(out), None, _by_name(first.modulation)
        y, stats2 = first.second_norm(a, mod, x1=x1)
        if "hidden" in POLICIES[options.recompute].keeps:
            hidden = y.new_empty((len(as_rows(y)), len(w.fc1_weight)))
        m = mlp_branch(y, options.mlp, w, hidden=hidden)
        gated_residual_forward(x1, first.by_sample(m), mod.gate2, y=x1)
        return Activations(stats1, *qkv, attended, logsumexp, a, stats2, hidden, m)

    def first_norm(self, mod: LayerModulation) -> tuple[Tensor, Tensor]:
        """y1 (B, T, D) and its statistics."""
        y, stats = adaln_norm_forward(
            self.by_sample(self.x), mod.scale1, mod.shift1, self.options.norm
        )
        return y.view(self.x.shape), stats

    def second_norm(
        self, a: Tensor, mod: LayerModulation, *, x1: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y2 (B, T, D) and its statistics; writes x1 where it is given."""
        y, stats = gated_adaln_norm_forward(
            self.by_sample(self.x), self.by_sample(a), mod.between, self.options.norm, x1=x1
        )
        return y.view(self.x.shape), stats

    def backward(
        self, dout: Tensor, kept: dict[str, Tensor | None], gradients: Gradients, *, owned: bool
    ) -> tuple[Tensor, Tensor]:
        """dx (B, T, D) and dmodulation (samples, 6 D).

        kept has the names of `Activations`, and is emptied as they are used up. What is owned is
        written over: no one reads it after this. Without q, k and v, which the widest tensors of
        the attention's backward are made from, a few samples run at a time.
        """
        if kept["qkv"] is not None:
            return self._gradients(dout, kept, gradients, owned=owned)
        dx = torch.empty_like(self.x, dtype=dout.dtype)
        dmodulation = torch.empty_like(self.modulation)
        size = GPU_PART if kept["a"] is not None and runs_as_on_gpu(dout) else PART
        gradients.parts = len(self._cuts(size)) > 1
        for samples, rows, call in self._parts(dout.dtype, size):
            own = {name: _part(t, samples, len(self.x)) for name, t in kept.items()}
            if own["a"] is None:
                call = call._replace(options=self.options._replace(recompute="none"))
                own, owned = call.forward()[1]._asdict(), True
            dx[samples], dmodulation[rows] = call._gradients(
                dout[samples], own, gradients, owned=owned
            )
        kept.clear()
        return dx, dmodulation

    def _cuts(self, tokens: int) -> list[slice]:
        """A few samples each."""
        B, T, _ = self.x.shape
        return list(chunks(B, max(tokens // max(T, 1), 1)))

    def _parts(self, dtype: torch.dtype, tokens: int) -> Iterator["Part"]:
        """Calls of a few samples each, one after another, with x in the dtype of the stream."""
        each = len(self.modulation) // max(len(self.x), 1)  # rows of the modulation to one of B
        for samples in self._cuts(tokens):
            rows = slice(samples.start * each, samples.stop * each)
            x = self.x[samples].to(dtype)
            yield Part(samples, rows, self._replace(x=x, modulation=self.modulation[rows]))

    def _gradients(
        self, dout: Tensor, kept: dict[str, Tensor | None], gradients: Gradients, *, owned: bool
    ) -> tuple[Tensor, Tensor]:
        first, dmodulation = self.first(), torch.empty_like(self.modulation)
        shared = first.modulation is self.modulation
        dfirst = dmodulation if shared else torch.empty_like(first.modulation)
        mods = _by_name(first.modulation), _by_name(dfirst)
        dx1, da = first._mlp_backward(dout, kept, *mods, gradients, owned=owned)
        mods = _by_name(self.modulation), _by_name(dmodulation)
        dx = self._attention_backward(da, dx1, kept, *mods, gradients, owned=owned)
        if not shared:
            _write_first(dmodulation, dfirst, self.x.shape)
        return dx, dmodulation

    def _mlp_backward(
        self,
        dout: Tensor,
        kept: dict[str, Tensor | None],
        mod: LayerModulation,
        dmod: LayerModulation,
        gradients: Gradients,
        *,
        owned: bool,
    ) -> tuple[Tensor, Tensor]:
        """dx1, by sample, and da (B, T, D)."""
        a, m, hidden, y, dhidden = kept.pop("a"), kept.pop("m"), kept.pop("hidden"), None, None
        dm = _buffer(m, owned)
        gated_residual_backward(
            *map(self.by_sample, (dout, m)),
            mod.gate2,
            dh=self.by_sample(dm),
            dgate=dmod.gate2,
        )
        if hidden is None:
            y, _ = self.second_norm(a, mod, x1=None)
        else:
            dhidden = _buffer(hidden, owned)
        dy = mlp_branch_backward(
            dm, y, hidden, self.options.mlp, self.weights, dhidden=dhidden, gradients=gradients
        )
        del m, dm, y
        da = _buffer(a, owned)
        dx1 = gated_adaln_norm_backward(
            *map(self.by_sample, (dy, dout, self.x, a)),
            mod.between,
            kept.pop("stats2"),
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
        kept: dict[str, Tensor | None],
        mod: LayerModulation,
        dmod: LayerModulation,
        gradients: Gradients,
        *,
        owned: bool,
    ) -> Tensor:
        """dx (B, T, D)."""
        w, num_queries, qkv = (
            self.weights,
            self.options.num_queries,
            QKV(kept.pop("q"), kept.pop("qkv")),
        )
        if qkv.qkv is None:
            qkv, owned = project_qkv(self.first_norm(mod)[0], w, num_queries), True
        # the norm of queries and keys reads qkv after dqkv has been written
        dqkv = QKV(*(_buffer(t, owned and w.q_weight is None) for t in qkv))
        attended, logsumexp = kept.pop("attended"), kept.pop("logsumexp")
        attention_branch_backward(
            da, qkv, attended, logsumexp, self.options.num_heads, w, self.rotary,
            dqkv=dqkv, gradients=gradients,
        )  # fmt: skip
        del attended
        dy = project_qkv_backward(dqkv, w)
        dx = adaln_norm_backward(
            self.by_sample(dy),
            dx1 if num_queries is None else None,
            self.by_sample(self.x),
            mod.scale1,
            mod.shift1,
            kept.pop("stats1"),
            self.options.norm,
            y=self.by_sample(dy),
            dscale=dmod.scale1,
            dshift=dmod.shift1,
        )
        add_qkv(gradients, dqkv, dy)  # y is written over dy by now
        dx = dx.view(self.x.shape)
        if num_queries is not None:
            dx[:, :num_queries] += dx1.view(len(dx), num_queries, dx.shape[-1])
        return dx


class Part(NamedTuple):
    """Some samples of a call."""

    samples: slice
    """Of B."""
    rows: slice
    """Of the modulation."""
    call: LayerCall


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


def _by_name(modulation: Tensor) -> LayerModulation:
    return LayerModulation(*modulation.chunk(6, dim=-1))


def _buffer(tensor: Tensor | None, owned: bool) -> Tensor | None:
    """Where a gradient of this shape goes: over the tensor itself, if it may."""
    if tensor is None:
        return None
    if not owned:
        return torch.empty_like(tensor)
    # whoever else had saved it is told, instead of reading a gradient for an activation
    torch.autograd.graph.increment_version(tensor)
    return tensor
