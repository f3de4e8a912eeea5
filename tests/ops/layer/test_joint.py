"""What only a layer of two streams promises."""

import pytest
import torch
from ops.kinds import LAYERS
from ops.layer.test_kinds import assert_exact
from ops.one_joint import DualAndKeysOnly, OneJoint
from ops.one_layer import EVERY_POLICY, TARGETS, assert_same_bits, gradients, saved_by

from dbkernels.ops import joint_layer

F64 = torch.float64


@pytest.mark.parametrize("kind", ["joint", "dual, keys only"])
def test_streams_of_two_widths_with_adapters_agree_in_float64(kind):
    told = {"rotated": True, "head_dim": 10, "adapters": TARGETS, "dtypes": (F64,) * 3}
    layer = LAYERS[kind](3, 7, C=18, **told)
    assert len({n.partition(".")[0] for n in layer.tensors if n.endswith("_down")}) > 1
    exact = layer.exact()
    for recompute in EVERY_POLICY:
        assert_exact(layer.with_grads(recompute=recompute), exact)


@pytest.mark.parametrize("recompute", ["none", "qkv", "layer"])
@pytest.mark.parametrize("read", ["x", "context"])
def test_a_result_that_nothing_reads_has_a_gradient_of_zeros(read, recompute):
    layer = OneJoint(rotated=True)
    leaves, size = layer.leaves(), layer.tensors["x"][0].numel()
    y = layer.run(leaves, recompute=recompute)
    mask = torch.zeros_like(y)
    (mask[:, :size] if read == "x" else mask[:, size:]).fill_(1)
    expected = gradients(y, leaves, mask)
    results = []

    def alone(*args, **options):
        both = joint_layer(*args, **options)
        results.append(both[0] if read == "x" else both[1])
        return both

    layer.run(leaves, alone, recompute=recompute)
    assert_same_bits(gradients(results[0].sum(), leaves), expected)


def test_nothing_reads_the_queries_of_a_context_that_is_only_keys_and_values():
    layer = DualAndKeysOnly(rotated=True)
    grads, width = layer.with_grads(), 24
    for name in ("context.qkv_weight", "context.qkv_bias"):
        assert not grads[name][:width].any() and grads[name][width:].all()
    assert not grads["context.q_weight"].any() and grads["context.k_weight"].all()


def test_the_last_backward_writes_over_what_was_kept():
    layer = DualAndKeysOnly(qk_norm=False)
    for retain, expected in ((True, []), (False, [24, 24, 24, 40, 48, 72, 72])):
        leaves = layer.leaves()
        y, kept = saved_by(lambda leaves=leaves: layer.run(leaves))
        before = {address: t.detach().clone() for address, t in kept.items()}
        gradients(y.sum(), leaves, retain_graph=retain)
        changed = [t.shape[-1] for a, t in kept.items() if not torch.equal(t, before[a])]
        # a, a2 and m, the MLP's pre-activation, keys and values, and q, k and v twice
        assert sorted(changed) == expected


@pytest.mark.parametrize("kind", ["joint", "dual, keys only"])
def test_compiles_without_graph_breaks(kind):
    layer = LAYERS[kind](rotated=True)
    compiled = torch.compile(joint_layer, backend="aot_eager", fullgraph=True)
    actual, expected = layer.with_grads(compiled, recompute="qkv"), layer.with_grads()
    for name, t in expected.items():
        torch.testing.assert_close(actual[name], t, rtol=1e-4, atol=1e-4)
