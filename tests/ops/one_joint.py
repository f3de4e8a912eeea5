"""Tensors of one joint layer for its tests, and the layer as a function of tensors alone."""

import torch
from ops.one_layer import TARGETS, OneLayer

from dbkernels.models.rotary import rotary_table
from dbkernels.ops import joint_layer, reference_layers

KEYS = ("qkv", "q_", "k_", "v_")
ATTENTION = (*KEYS, "out")


class OneJoint(OneLayer):
    """x and a longer context, each drawn as a layer of its own, whose names have a prefix."""

    op, specification = staticmethod(joint_layer), staticmethod(reference_layers.joint_layer)
    keys_only = dual = False
    longer = 2  # tokens by which the context is

    def __init__(self, B=2, T=5, D=24, H=3, *, C=None, rotated=False, head_dim=None, **options):
        C, self.S = C or D, T + self.longer
        told = {"head_dim": head_dim, **options}
        super().__init__(B, T, D, H, **told)
        self.streams = {"context.": OneLayer(B, self.S, C, H, **told)}
        if self.dual:
            self.streams["second."] = OneLayer(B, T, D, H, **told)
        for prefix, layer in self.streams.items():
            own = layer.tensors
            self.tensors |= {f"{prefix}{n}": own[n] for n in ("x", "modulation")}
            has = ATTENTION if prefix == "second." else KEYS if self.keys_only else ("",)
            there = {n: t for n, t in list(own.items())[2:] if n.startswith(has)}
            layer.adapters = {n: a for n, a in layer.adapters.items() if f"{n}_down" in there}
            self.tensors |= {f"{prefix}{n}": t for n, t in there.items()}
        if self.keys_only:
            modulation = self.tensors["context.modulation"]
            self.tensors["context.modulation"] = modulation[..., : 2 * C].clone()
        if self.dual:
            del self.tensors["second.x"]
            own = [self.tensors["modulation"], self.tensors.pop("second.modulation")]
            self.tensors["modulation"] = torch.cat([own[0], own[1][..., : 3 * D]], -1)
        places = torch.arange(self.S + T)
        self.options["rotary"] = rotary_table(places, head_dim or D // H) if rotated else None

    def run(self, tensors, op=None, **options):
        """All results of a sample in one row."""
        weights = {
            prefix: layer.weights_of({n: tensors.get(f"{prefix}{n}") for n in self._names()})
            for prefix, layer in self.streams.items()
        }
        names = ("x", "context.x", "modulation", "context.modulation")
        given = *(tensors[n] for n in names), self.weights_of(tensors), weights["context."]
        told = {"second_weights": weights.get("second."), **self.options, **options}
        results = (op or self.op)(*given, **told)
        return torch.cat([t.flatten(1) for t in results if t is not None], 1)

    def _names(self):
        kinds = ("weight", "bias", "down", "up")
        return [f"{name}_{kind}" for name in TARGETS for kind in kinds]

    def told(self):
        """Tensors of the options."""
        return [self.options["rotary"]]

    def rows(self, recompute):
        """As `OneParallel.rows`."""
        T = self.tensors["x"].shape[1]
        units = {"none": 10, "attention": 9, "mlp": 6, "qkv": 3}
        more = {"none": 5, "attention": 4, "mlp": 5, "qkv": 2} if self.dual else {}
        # of float32: two norms, and the logsumexp of three heads where attended is kept
        heads = {"none": 3, "mlp": 3, "qkv": 3}
        norms = 4 if recompute in units else 0
        own = units.get(recompute, 0), norms + heads.get(recompute, 0)
        x = own[0] + more.get(recompute, 0), own[1] + (heads.get(recompute, 0) if self.dual else 0)
        if self.keys_only:
            own = (0 if recompute == "qkv" else 2, 2) if recompute in units else (0, 0)
        return [(T, 1, *x), (self.S, 1, *own)]


class KeysOnly(OneJoint):
    keys_only = True
    # of few tokens the largest error in a matrix is luck: from 0.6 to 2.1 of eager's, by the seed
    longer = 11


class Dual(OneJoint):
    dual = True


class DualAndKeysOnly(OneJoint):
    dual = keys_only = True
