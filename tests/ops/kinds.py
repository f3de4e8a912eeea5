"""Layers of other kinds than the AdaLN layer, for the tests that all of them share."""

from ops.one_joint import Dual, DualAndKeysOnly, KeysOnly, OneJoint
from ops.one_layer import OneLayer

from dbkernels.ops import parallel_layer, reference_layers


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


LAYERS = {"parallel": OneParallel}
LAYERS |= {
    "joint": OneJoint, "dual": Dual, "keys only": KeysOnly, "dual, keys only": DualAndKeysOnly
}  # fmt: skip
