"""The tensors of one AdaLN layer, by name, and the residual stream through a stack of layers.

    x[l + 1] = x[l] + gate1[l] * a[l] + gate2[l] * m[l]

A layer keeps its branches' outputs a and m for the gradients of its gates, so in a run of layers
only the first need keep x. The others compute it again, by the same sums in the same order.
"""

import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dbkernels.ops.adaln_norm import NormOptions
from dbkernels.ops.dropout import Dropout
from dbkernels.ops.gated_residual import gated_residual_forward
from dbkernels.ops.layer.condition import Condition, rows_of_modulation
from dbkernels.ops.layer.modulation import LayerModulation, Layout, SecondModulation
from dbkernels.ops.layer.part import Part, Wanted
from dbkernels.ops.layer.weights import LayerWeights

AttentionKind = Literal["full", "causal", "two_stream"]
LENGTH = 4  # layers of a run: the last of n rebuilds x by 2 (n - 1) gated sums


class LayerOptions(NamedTuple):
    """What a layer is told beside its tensors."""

    num_heads: int
    mlp: str
    norm1: NormOptions
    norm2: NormOptions
    qk_eps: float
    """Of the norms of queries and keys."""
    recompute: str
    wanted: Wanted = Wanted()
    """Whose results are."""
    dropout: Dropout | None = None
    """What is left out; None is nothing."""
    attention: AttentionKind = "full"
    layout: Layout = LayerModulation
    """Of the modulation."""

    @property
    def streams(self) -> int:
        """Of the samples, which lie one after another."""
        return 2 if self.attention == "two_stream" else 1

    @property
    def streams_wanted(self) -> int:
        """Of the results."""
        return self.streams if self.wanted.samples is None else 1

    def of_part(self, part: Part) -> "LayerOptions":
        """For some of the samples."""
        wanted, dropout = self.wanted, self.dropout
        if wanted.samples is not None:
            wanted = wanted._replace(samples=part.stop - part.start)
        dropout = None if dropout is None else dropout.after(part.start)
        return self._replace(wanted=wanted, dropout=dropout)


class Activations(NamedTuple):
    """What one pass of a layer left behind; `recompute` says which of it is kept for the backward.

    n and N are the numbers of samples and tokens whose results are wanted: B and T where all are.
    Where streams share one attention, the last of them has what it left behind.
    """

    stats1: Tensor | None = None
    """(samples, tokens, 2), mean and rstd of the first norm."""
    q: Tensor | None = None
    """(n, N, H d) where that is less than B or T, before the norm and the rotation; else None."""
    qkv: Tensor | None = None
    """(B, T, 3 H d), before the norm and the rotation; (B, T, 2 H d) beside q."""
    attended: Tensor | None = None
    """(n, N, H d), of the attention, before its projection out; N of all streams that share it."""
    logsumexp: Tensor | None = None
    """(n, H, N)"""
    a: Tensor | None = None
    """(n, N, D), output of the attention branch, without what dropout left out."""
    stats2: Tensor | None = None
    """(samples, tokens, 2), of the second norm, of what is wanted."""
    hidden: Tensor | None = None
    """(n * N, F), or 2 F for swiglu: the MLP's pre-activation without its bias."""
    m: Tensor | None = None
    """(n, N, D), output of the MLP, without what dropout left out."""
    qkv2: Tensor | None = None
    """As qkv, of a second attention of the stream with itself; so are the next three."""
    attended2: Tensor | None = None
    logsumexp2: Tensor | None = None
    a2: Tensor | None = None
    cross_q: Tensor | None = None
    """(B, T, H d), queries of another sequence; what follows is None without cross-attention."""
    cross_kv: Tensor | None = None
    """(B, S, 2 H d), keys and values of that sequence."""
    cross_attended: Tensor | None = None
    """(B, T, H d), before its projection out."""
    cross_logsumexp: Tensor | None = None
    """(B, H, T)"""
    c: Tensor | None = None
    """(B, T, D), output of the cross-attention."""

    def of(self, part: Part, results: Part) -> "Activations":
        """What some samples left behind; results are those of them that are wanted."""
        parts = {"stats1": part, "qkv": part}
        return Activations(*(parts.get(n, results).of(t) for n, t in self._asdict().items()))

    def only(self, names: Collection[str]) -> "Activations":
        """Those of these names."""
        return Activations(*(t if name in names else None for name, t in self._asdict().items()))


class Context(NamedTuple):
    """Another sequence, of which each sample's first tokens are keys and values."""

    tokens: Tensor
    """(B, S, C), of any width and dtype."""
    lengths: Tensor | None
    """(B,) integers, how many tokens are keys; None is all."""
    gradient: Tensor | None = None
    """(B, S, C), where a backward writes that of the tokens; None where none is wanted."""

    def of(self, part: Part) -> "Context":
        """Of some samples."""
        return Context(*map(part.of, self))


class LayerCall(NamedTuple):
    """A layer and what goes in; weights have the dtype of the branches, x that of the stream."""

    x: Tensor
    """(B, T, D); in a backward it may be narrower than the stream."""
    modulation: Tensor | Condition
    """(samples, 6 D), where a token is a sample if each has a condition of its own; or what makes
    it, as the parts of a call have it."""
    rotary: Tensor | None
    """(2, T, d)"""
    weights: LayerWeights
    options: LayerOptions
    scale: Tensor | None = None
    """(B, T, 1) float32, by which x was divided before it was narrowed; None is 1."""
    second: LayerWeights | None = None
    """Of a second attention, without an MLP; None is no such attention."""
    mean: Tensor | None = None
    """(B, T, 1) float32, which was subtracted from x before that; None is 0."""
    context: Context | None = None
    """Of cross-attention."""

    @property
    def mod(self) -> tuple[Tensor, ...]:
        """By the names of its layout."""
        return self.options.layout.of(self.modulation)

    def alone(self) -> "LayerCall":
        """The second attention's, of which each token sees those of its own stream."""
        options = self.options._replace(layout=SecondModulation)
        return self._replace(weights=self.second, rotary=None, options=options, second=None)

    def by_sample(self, t: Tensor) -> Tensor:
        return by_sample(t, len(self.modulation))

    def first(self) -> "LayerCall":
        """Samples and tokens whose results are wanted, for all that follows the attention."""
        wanted, modulation = self.options.wanted, self.modulation
        if wanted.is_all:
            return self
        of_each = wanted._replace(tokens=None) if len(modulation) == len(self.x) else wanted
        if not of_each.is_all:
            modulation = of_each.of(by_sample(modulation, len(self.x))).flatten(0, 1)
        return self._replace(x=wanted.of(self.x), modulation=modulation)

    def parts(
        self,
        dtype: torch.dtype,
        tokens: int,
        modulation_of: Callable[[Part], Tensor] | None = None,
        beside: int = 0,
    ) -> Iterator[tuple[Part, "LayerCall"]]:
        """Calls of a few samples each, one after another, with x in the dtype of the stream.

        Args:
            dtype:          of the stream
            tokens:         of a part, about
            modulation_of:  some samples; None computes it without a gradient
            beside:         tokens of other streams that run with a sample of this one
        """
        modulation_of = modulation_of or self._modulation_of
        for part in self.samples(tokens, beside):
            x = part.of(self.x).to(dtype)
            if self.scale is not None:
                x *= part.of(self.scale)
            if self.mean is not None:
                x += part.of(self.mean)
            options, modulation = self.options.of_part(part), modulation_of(part)
            context = None if self.context is None else self.context.of(part)
            yield (
                part,
                self._replace(
                    x=x,
                    modulation=modulation,
                    options=options,
                    scale=None,
                    mean=None,
                    context=context,
                ),
            )

    def samples(self, tokens: int, beside: int = 0) -> Iterator[Part]:
        """A few samples at a time, of about so many tokens together with those beside them."""
        (rows, T, _), streams = self.x.shape, self.options.streams
        B = rows // streams
        for few in chunks(B, max(tokens // max(streams * T + beside, 1), 1)):
            yield Part(few.start, few.stop, B, streams)

    def all_samples(self) -> Part:
        """As one part."""
        B = len(self.x) // self.options.streams
        return Part(0, B, B, self.options.streams)

    def results(self, part: Part) -> Part:
        """Where the results of some samples lie among all that are wanted."""
        return part._replace(streams=self.options.streams_wanted)

    def _modulation_of(self, part: Part) -> Tensor:
        if isinstance(self.modulation, Tensor):
            return part.of(self.modulation)
        of_part = self.modulation._replace(c=part.of(self.modulation.c))
        return rows_of_modulation(of_part.modulation())


class Kept(dict[str, Tensor | None]):
    """What a forward kept, by the names of `Activations`.

    What is owned is written over: no one reads it after this.
    """

    def __init__(self, activations: Activations, *, owned: bool):
        super().__init__(activations._asdict())
        self.owned = owned

    def buffer(self, tensor: Tensor | None) -> Tensor | None:
        """Where a gradient of this shape goes: over the tensor itself, if it may."""
        if tensor is None or not self.owned:
            return like(tensor)
        # whoever else had saved it is told, instead of reading a gradient for an activation
        torch.autograd.graph.increment_version(tensor)
        return tensor

    def take_second(self) -> "Kept":
        """What a second attention left behind, by the names of a first; it is here no more."""
        names = ("qkv", "attended", "logsumexp")
        taken = Activations(**{name: self.pop(f"{name}2") for name in names})
        return Kept(taken, owned=self.owned)


class Turn:
    """A layer's call in a run: the layers after it keep its a and m for their own backward.

    Args:
        earlier:  the calls of the run so far
    """

    def __init__(self, earlier: tuple["Turn", ...] = ()):
        self.earlier, self.is_done = earlier, False
        self._later: list[weakref.ref[Turn]] = []
        for turn in earlier:
            # a graph that nobody holds any more reads nothing
            turn._later.append(weakref.ref(self))

    def is_read(self) -> bool:
        """Whether a layer after it still may ask for its a and m."""
        return any((later := ref()) is not None and not later.is_done for ref in self._later)


class ResidualStream:
    """Follows x through a stack of layers, so that not each of them keeps it.

    Give the same one to each layer in order. Where x is not the output of the layer before, a new
    run starts, so other operations may stand between layers. It must not be given to a layer inside
    `torch.utils.checkpoint`, which would run the layer again after the stream has gone on.
    """

    def __init__(self) -> None:
        self._run: tuple[Tensor, ...] = ()
        self._out: Tensor | None = None
        self._version = 0  # of it
        self._turns: tuple[Turn, ...] = ()

    def run_to(self, x: Tensor) -> tuple[tuple[Tensor, ...], Turn]:
        """The run that leads to x, for `end_of_run`, and the layer's turn in it.

        It is x alone where the layer has to keep it.
        """
        if not self._is_out(x) or len(self._run) > 1 + 4 * (LENGTH - 1):
            return (x.detach(),), Turn()
        return self._run, Turn(self._turns)

    def _is_out(self, x: Tensor) -> bool:
        """Whether x is the output of the layer before, or a view of all of it, as it was made."""
        out = self._out
        if out is None or torch.compiler.is_compiling():
            return x is out
        if (x.shape, x.stride()) != (out.shape, out.stride()) or x._version != self._version:
            return False
        # FSDP2 hands a layer its input through a function of its own, which gives a view
        same = x.untyped_storage()._cdata == out.untyped_storage()._cdata
        return same and x.storage_offset() == out.storage_offset()

    def extend(self, run: tuple[Tensor, ...], turn: Turn, out: Tensor, *sums: Tensor) -> None:
        """Add a layer: what `run_to` gave for its input, its output, gate1, a, gate2 and m."""
        self._run, self._out = (*run, *(t.detach() for t in sums)), out
        self._version = 0 if torch.compiler.is_compiling() else out._version
        self._turns = (*turn.earlier, turn)


def end_of_run(start: Tensor, sums: Sequence[Tensor]) -> Tensor:
    """The stream at the end of a run, by the sums of the forward in their order.

    Args:
        start:  (B, T, D)  x of the run's first layer
        sums:   of each gated sum since, the gate (samples, D) and the branch (B, T, D)
    """
    x = start
    for gate, h in zip(sums[::2], sums[1::2], strict=True):
        y = torch.empty_like(x) if x is start else x
        x_rows, h_rows, y_rows = (by_sample(t, len(gate)) for t in (x, h, y))
        gated_residual_forward(x_rows, h_rows, gate, y=y_rows)
        x = y
    return x


def by_sample(t: Tensor, samples: int) -> Tensor:
    """(..., D) as (samples, tokens of one, D)."""
    return t.view(samples, t.numel() // (max(samples, 1) * t.shape[-1]), t.shape[-1])


def chunks(rows: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` rows; an empty one where there are none, so that sums are zeros."""
    for start in range(0, max(rows, 1), size):
        yield slice(start, min(start + size, rows))


def like(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else torch.empty_like(tensor)
