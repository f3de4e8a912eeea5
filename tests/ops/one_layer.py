"""Tensors of one AdaLN layer for its tests, and the layer as a function of tensors alone."""

from functools import wraps

import torch
from accuracy import assert_as_accurate_as_eager, with_grads
from torch.utils._python_dispatch import TorchDispatchMode

from dbkernels.models.rotary import rotary_table
from dbkernels.ops import POLICIES, Adapter, LayerWeights, adaln_layer, reference

EVERY_POLICY = list(POLICIES)
# of two samples, or one in two streams; what a layer is asked for beside a policy
KINDS = [
    {},
    {"attention": "causal"},
    {"attention": "two_stream"},
    {"attention": "two_stream", "num_samples": 1},
]
# of adapters, each by its projection and the third of its outputs
TARGETS = {name: (name, None) for name in ("qkv", "out", "fc1", "fc2")}
TARGETS |= {name: ("qkv", third) for third, name in enumerate(("q", "k", "v"))}
SCALE = 0.6  # of them: no power of two, which would be exact
SAME_BITS = [recompute for recompute, policy in POLICIES.items() if not policy.narrow]


class OneLayer:
    """The inputs and weights of a layer that are there, by name, and what it is told beside them.

    Gates and scales are random, the stream has a mean: nothing cancels or hides.
    """

    op, specification, chunks = staticmethod(adaln_layer), staticmethod(reference.adaln_layer), 6

    def __init__(
        self,
        B=2, T=5, D=24, H=3, *, hidden=40, mlp="gelu", norm="layer", bias=True, qk_norm=True,
        rotated=False, per_token=False, head_dim=None, dtypes=(torch.float32,) * 3,
        adapters=(), rank=2, adapter_dtype=None,
    ):  # fmt: skip
        def normal(*shape, std=1.0, mean=0.0):
            return mean + std * torch.randn(shape, dtype=torch.float64)

        first, d = (2 * hidden if mlp == "swiglu" else hidden), head_dim or D // H
        shapes = {"qkv": (3 * H * d, D), "out": (D, H * d), "fc1": (first, D), "fc2": (D, hidden)}
        biases = [f"{name}_bias" for name in (shapes if bias is True else bias or ())]
        weights = {}
        for name, (width, read) in shapes.items():
            weights[f"{name}_weight"] = normal(width, read, std=read**-0.5)
            weights[f"{name}_bias"] = normal(width, std=0.3)
        weights["q_weight"] = normal(d, std=0.5, mean=1.5)
        weights["k_weight"] = normal(d, std=0.5, mean=-1.0)
        x_dtype, modulation_dtype, dtype = dtypes
        samples = (B, T) if per_token else (B,)
        self.tensors = {
            "x": normal(B, T, D, mean=2.0).to(x_dtype),
            "modulation": normal(*samples, self.chunks * D, std=0.5).to(modulation_dtype),
        }
        for name, weight in weights.items():
            has_bias = "bias" not in name or name in biases
            if has_bias and (qk_norm or name not in ("q_weight", "k_weight")):
                self.tensors[name] = weight.to(dtype)
        self.adapters = {}
        for target in adapters:
            projection, third = TARGETS[target]
            outputs, reads = shapes[projection]
            outputs, start = (outputs, 0) if third is None else (H * d, third * H * d)
            self.adapters[target] = projection, start
            for kind, shape in (("down", (rank, reads)), ("up", (outputs, rank))):
                # what it adds is as large as what it is added to
                small = normal(*shape, std=shape[-1] ** -0.5).to(adapter_dtype or dtype)
                self.tensors[f"{target}_{kind}"] = small
        rotary = rotary_table(torch.arange(T), d) if rotated else None
        self.options = {"num_heads": H, "mlp": mlp, "norm": norm, "rotary": rotary}
        self.options |= {"head_dim": head_dim} if head_dim else {}

    @property
    def weights(self):
        return self.weights_of(self.tensors)

    def weights_of(self, tensors):
        adapters = tuple(
            Adapter(projection, tensors[f"{name}_down"], tensors[f"{name}_up"], SCALE, start)
            for name, (projection, start) in self.adapters.items()
        )
        return LayerWeights(*map(tensors.get, LayerWeights._fields[:-1]), adapters)

    def run(self, tensors, op=None, **options):
        """op on these tensors, by name; None is the layer's own."""
        weights, op = self.weights_of(tensors), op or self.op
        return op(tensors["x"], tensors["modulation"], weights, **self.options, **options)

    def leaves(self):
        return {name: t.detach().requires_grad_() for name, t in self.tensors.items()}

    def with_grads(self, op=None, *, tensors=None, **options):
        """The output and the gradient in every tensor, by name."""
        tensors = tensors or self.tensors

        def f(*values):
            return self.run(dict(zip(tensors, values, strict=True)), op, **options)

        return dict(zip(["out", *tensors], with_grads(f, *tensors.values()), strict=True))

    def exact(self, **options):
        """What the specification gives in float64."""
        tensors = {name: t.double() for name, t in self.tensors.items()}
        return self.with_grads(self.specification, tensors=tensors, **options)

    def assert_as_accurate_as_eager(self, *results, **options):
        """Each of the results, by `with_grads`."""
        self.compare(results, self.with_grads(self.specification, **options), **options)

    def compare(self, results, eager, **options):
        eager, exact = together(eager), together(self.exact(**options))
        for actual in map(together, results):
            assert actual.keys() == eager.keys()
            for name, value in actual.items():
                assert_as_accurate_as_eager(name, value, eager[name], exact[name])


def together(results):
    """The gradients of the norms of queries and keys as one, and those of cross-attention's biases:
    the largest error of so few elements is a fluke, of eager as of the layer."""
    found = {}
    for name, t in results.items():
        if t.dim() == 1 and name.endswith(("q_weight", "k_weight")):
            name = "qk_weights"
        elif name.startswith("cross_") and t.dim() == 1:
            name = "cross_biases"
        found.setdefault(name, []).append(t)
    return {name: ts[0] if len(ts) == 1 else torch.cat(ts) for name, ts in found.items()}


def assert_same_bits(actual, expected):
    assert actual.keys() == expected.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name


def assert_close(actual, expected, tolerance=1e-11):
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=tolerance, atol=tolerance,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


def gradients(y, leaves, dy=None, **options):
    """The gradient in every leaf that wants one, by name."""
    wanted = {name: t for name, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(y, list(wanted.values()), dy, **options)
    return dict(zip(wanted, grads, strict=True))


def in_autocast(op):
    @wraps(op)
    def f(*args, **options):
        with torch.autocast("cpu", torch.bfloat16):
            return op(*args, **options)

    return f


def saved_by(step, *, but=()):
    """step(), and what autograd kept for its backward: a tensor of each storage, by address.

    The storages of the tensors in `but` are left out.
    """
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = step()
    for t in but:
        kept.pop(t.untyped_storage().data_ptr(), None)
    return result, kept


def saved_bytes(step, *, but=()):
    """Bytes of the storages that autograd keeps for the backward of step()."""
    return sum(t.untyped_storage().nbytes() for t in saved_by(step, but=but)[1].values())


class Ops(TorchDispatchMode):
    """The ops that run within: the name of each, and the shapes of its tensors."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        shapes = [t.shape for t in args if isinstance(t, torch.Tensor)]
        self.calls.append((func._schema.name.partition("::")[2], shapes))
        return func(*args, **(kwargs or {}))
