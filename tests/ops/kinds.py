"""Layers of other kinds than the AdaLN layer, for the tests that all of them share."""

import torch
from ops.one_joint import Dual, DualAndKeysOnly, KeysOnly, OneJoint
from ops.one_layer import OneLayer

from dbkernels.ops import cross_layer, parallel_layer, reference_layers


class OneParallel(OneLayer):
    op, chunks = staticmethod(parallel_layer), 3
    specification = staticmethod(reference_layers.parallel_layer)
    S = 0  # keys of another sequence

    def told(self):
        """Tensors of the options."""
        return [self.options["rotary"]]

    def units(self, recompute):
        """What is kept of a token, and of a key of another sequence, in D elements; and in float32
        numbers of a token: the statistics of a norm, and the logsumexp of three heads."""
        units = {"none": 10, "attention": 9, "mlp": 6, "qkv": 3, "layer": 1, "layer_narrow": 1}
        floats = {"none": 2 + 3, "attention": 2, "layer": 0, "layer_narrow": 0}
        return units[recompute], 0, floats.get(recompute, 2 + 3)

    def rows(self, recompute):
        """What is kept of each sequence: its tokens; then of a token, in D elements, that has the
        dtype of the stream and that of the branches; and float32 numbers of a token."""
        units, context, floats = self.units(recompute)
        return [(self.tensors["x"].shape[1], 1, units - 1, floats), (self.S, 0, context, 0)]


class OneCross(OneLayer):
    """With another sequence of S tokens of a width of its own, some of them no keys."""

    op, specification = staticmethod(cross_layer), staticmethod(reference_layers.cross_layer)

    def __init__(self, B=2, T=5, D=24, H=3, *, S=None, bias=True, lengths=True, **told):
        super().__init__(B, T, D, H, bias=bias, **told)
        width, self.S = self.tensors["out_weight"].shape[1], T + 1 if S is None else S
        dtype, C = self.tensors["qkv_weight"].dtype, 18 if D == 24 else D
        shapes = {"cross_q": (width, D), "cross_kv": (2 * width, C), "cross_out": (D, width)}
        for name, shape in shapes.items():
            self.tensors[f"{name}_weight"] = (torch.randn(shape) * shape[1] ** -0.5).to(dtype)
            if bias:
                self.tensors[f"{name}_bias"] = (0.3 * torch.randn(shape[0])).to(dtype)
        self.tensors["context"] = (torch.randn(B, self.S, C) + 1).to(self.tensors["x"].dtype)
        some = [self.S, self.S // 2 + 1, 0, 1, self.S - 1][:B]
        self.options["lengths"] = torch.tensor(some, dtype=torch.int64) if lengths else None

    def run(self, tensors, op=None, **options):
        weights, op = self.weights_of(tensors), op or self.op
        given = tensors["x"], tensors["modulation"], tensors["context"]
        return op(*given, weights, **self.options, **options)

    def told(self):
        return [t for t in (self.options["rotary"], self.options["lengths"]) if t is not None]

    def rows(self, recompute):
        units = {"none": 14, "attention": 12, "mlp": 10, "qkv": 6, "layer": 1, "layer_narrow": 1}
        floats = {"none": 4 + 6, "attention": 4, "layer": 0, "layer_narrow": 0}
        x, weight = self.tensors["x"], self.tensors["qkv_weight"]
        if x.dtype.itemsize > weight.dtype.itemsize:
            floats["layer_narrow"] = 1  # the mean of x
        of_context = 2 if recompute in ("none", "attention", "mlp") else 0
        of_x = x.shape[1], 1, units[recompute] - 1, floats.get(recompute, 4 + 6)
        return [of_x, (self.S, 0, of_context, 0)]


LAYERS = {"parallel": OneParallel, "cross": OneCross}
LAYERS |= {
    "joint": OneJoint, "dual": Dual, "keys only": KeysOnly, "dual, keys only": DualAndKeysOnly
}  # fmt: skip
