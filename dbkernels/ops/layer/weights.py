"""The weights of one layer, by name."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from dbkernels.ops.layer.linear import Adapter, Linear, adapter_names, flat_adapters, with_adapters
from dbkernels.ops.layer.ranks import Ranks


class LayerWeights(NamedTuple):
    """What a layer learns, but for its condition's projection.

    F is the hidden layer's width, and H heads of width d are usually, not always, as wide as D. On
    one of several ranks that share a layer, H and F are this rank's own.
    """

    qkv_weight: Tensor
    """(3 H d, D), queries first, then keys, then values."""
    qkv_bias: Tensor | None
    """(3 H d,)"""
    out_weight: Tensor
    """(D, H d)"""
    out_bias: Tensor | None
    """(D,)"""
    fc1_weight: Tensor
    """(F, D); for swiglu (2 F, D), the half under silu first."""
    fc1_bias: Tensor | None
    """(F,) or (2 F,)"""
    fc2_weight: Tensor
    """(D, F)"""
    fc2_bias: Tensor | None
    """(D,)"""
    q_weight: Tensor | None = None
    """(d,), of the RMS norm of queries; None leaves queries and keys as they are."""
    k_weight: Tensor | None = None
    """(d,), of the RMS norm of keys."""
    cross_q_weight: Tensor | None = None
    """(H d, D), to queries of another sequence; those of cross-attention are None without it."""
    cross_q_bias: Tensor | None = None
    """(H d,)"""
    cross_kv_weight: Tensor | None = None
    """(2 H d, C), of tokens of width C, keys first, then values."""
    cross_kv_bias: Tensor | None = None
    """(2 H d,)"""
    cross_out_weight: Tensor | None = None
    """(D, H d)"""
    cross_out_bias: Tensor | None = None
    """(D,)"""
    ranks: Ranks | None = None
    """That share the layer; None is a whole one. What they have between them adds up to it."""
    adapters: tuple[Adapter, ...] = ()
    """Of the projections above; queries alone are the first third of qkv's outputs."""

    @property
    def qkv(self) -> Linear:
        return self._by_outputs(self.qkv_weight, self.qkv_bias, "qkv")

    @property
    def out(self) -> Linear:
        return self._by_inputs(self.out_weight, self.out_bias, "out")

    @property
    def fc1(self) -> Linear:
        return self._by_outputs(self.fc1_weight, self.fc1_bias, "fc1")

    @property
    def fc2(self) -> Linear:
        return self._by_inputs(self.fc2_weight, self.fc2_bias, "fc2")

    def _by_outputs(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear:
        """A projection of whose outputs each rank has some."""
        return Linear(weight, bias, self._of(name), adds_back=self.ranks)

    def _by_inputs(self, weight: Tensor, bias: Tensor | None, name: str) -> Linear:
        """A projection of whose inputs each rank has some."""
        return Linear(weight, bias, self._of(name), adds=self.ranks)

    def _of(self, projection: str) -> tuple[Adapter, ...]:
        return tuple(a for a in self.adapters if a.projection == projection)

    @property
    def cross_q(self) -> Linear:
        return self._by_outputs(self.cross_q_weight, self.cross_q_bias, "cross_q")

    @property
    def cross_kv(self) -> Linear:
        return self._by_outputs(self.cross_kv_weight, self.cross_kv_bias, "cross_kv")

    @property
    def cross_out(self) -> Linear:
        return self._by_inputs(self.cross_out_weight, self.cross_out_bias, "cross_out")

    @property
    def qk_norms(self) -> tuple[Tensor | None, Tensor | None]:
        return self.q_weight, self.k_weight

    def tensors(self) -> tuple[Tensor | None, ...]:
        """All of them in one row, the adapters' last: what autograd sees."""
        return (*self[:-2], *flat_adapters(self.adapters))

    def names(self) -> tuple[str, ...]:
        """Of `tensors`, those by which `Gradients` knows them."""
        return (*self._fields[:-2], *adapter_names(self.adapters))

    def with_tensors(self, tensors: Sequence[Tensor | None]) -> "LayerWeights":
        """The same layer of other tensors, in the order of `tensors`."""
        count = len(self) - 2
        return LayerWeights(
            *tensors[:count], self.ranks, with_adapters(self.adapters, tensors[count:])
        )

    def without_tensors(self) -> "LayerWeights":
        """What `with_tensors` needs, and no tensor."""
        return self.with_tensors([None] * len(self.tensors()))
