"""Tensors of one joint layer for its tests, by name, and the layer as a function of them alone."""

import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from ops.one_layer import OneLayer

from dbkernels.models.rotary import rotary_table
from dbkernels.ops import LayerWeights, joint_layer, reference_layers

KEYS = ("qkv_weight", "qkv_bias", "q_weight", "k_weight")
ATTENTION = (*KEYS, "out_weight", "out_bias")


class JointCase:
    """x of S tokens, a context of T and of width C, and whether the layer has all that one may.

    Each stream is drawn as a layer of its own.
    """

    def __init__(
        self, B=3, S=5, T=4, D=24, C=18, H=3, *, keys_only=False, dual=False, rotated=False,
        per_token=False, head_dim=8, dtypes=(torch.float32,) * 3, **options,
    ):  # fmt: skip
        told = {"head_dim": head_dim, "dtypes": dtypes, "per_token": per_token, **options}
        own = {"": OneLayer(B, S, D, H, **told), "context": OneLayer(B, T, C, H, **told)}
        if dual:
            own["second"] = OneLayer(B, S, D, H, **told)
        self.tensors = {}
        for stream, layer in own.items():
            for name, t in layer.tensors.items():
                is_only_keys = stream == "second" or (keys_only and stream == "context")
                there = ATTENTION if stream == "second" else KEYS
                if name in LayerWeights._fields and (name in there or not is_only_keys):
                    self.tensors[f"{stream}.{name}"] = t
        self.tensors["x"], self.tensors["context"] = (own[n].tensors["x"] for n in ("", "context"))
        modulation = own[""].tensors["modulation"]
        if dual:
            modulation = torch.cat(
                [modulation, own["second"].tensors["modulation"][..., : 3 * D]], -1
            )
        of_context = own["context"].tensors["modulation"]
        of_context = of_context[..., : 2 * C].clone() if keys_only else of_context
        self.tensors |= {"modulation": modulation, "context_modulation": of_context}
        rotary = rotary_table(torch.arange(T + S), head_dim) if rotated else None
        self.options = own[""].options | {"rotary": rotary, "head_dim": head_dim}

    def arguments(self, tensors):
        of = {
            stream: LayerWeights(*(tensors.get(f"{stream}.{n}") for n in LayerWeights._fields))
            for stream in ("", "context", "second")
        }
        second = of["second"] if of["second"].qkv_weight is not None else None
        names = ("x", "context", "modulation", "context_modulation")
        return [*(tensors[n] for n in names), of[""], of["context"]], {"second_weights": second}

    def run(self, tensors, op=joint_layer, **options):
        """The results that there are."""
        given, second = self.arguments(tensors)
        x, context = op(*given, **second, **self.options, **options)
        return (x,) if context is None else (x, context)

    def leaves(self):
        return {name: t.detach().requires_grad_() for name, t in self.tensors.items()}

    def with_grads(self, op=joint_layer, *, tensors=None, **options):
        """The outputs and the gradient in every tensor, by name."""
        tensors = tensors or self.tensors

        def f(*values):
            return self.run(dict(zip(tensors, values, strict=True)), op, **options)

        results = with_grads(f, *tensors.values())
        outs = [f"out{i}" for i in range(len(results) - len(tensors))]
        return dict(zip([*outs, *tensors], results, strict=True))

    def exact(self, **options):
        """What the specification gives in float64."""
        tensors = {name: t.double() for name, t in self.tensors.items()}
        return self.with_grads(reference_layers.joint_layer, tensors=tensors, **options)

    def assert_as_accurate_as_eager(self, *results, eager=None):
        """Each of the results, by `with_grads`."""
        eager = eager or self.with_grads(reference_layers.joint_layer)
        eager, exact = _together(eager), _together(self.exact())
        for actual in map(_together, results):
            for name, value in actual.items():
                assert_as_accurate_as_eager(name, value, eager[name], exact[name])


def _together(results):
    """The gradients of the norms of queries and keys as one: the largest error of so few elements
    is a fluke, of eager as of the layer."""
    few = [name for name in results if name.endswith(("q_weight", "k_weight"))]
    rest = {name: t for name, t in results.items() if name not in few}
    return {**rest, "qk_weights": torch.cat([results[name] for name in few])} if few else rest
