"""Layers of other kinds than the AdaLN layer, for the tests that all of them share."""

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


LAYERS = {"parallel": OneParallel}
