"""A layer whose attention is causal, or of two streams: who sees whom, to how many digits."""

from functools import partial

import pytest
import torch
from ops.one_layer import EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits, gradients

from dbkernels.ops import ResidualStream, adaln_layer, reference

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
CAUSAL, BOTH = {"attention": "causal"}, {"attention": "two_stream"}


def noisy_of(samples):
    return {**BOTH, "num_samples": samples // 2}


# one token; an odd number; more than a tile of the flash kernel, and no multiple of it; and many
@pytest.mark.parametrize(
    ("B", "T", "policies"),
    [*((4, T, EVERY_POLICY) for T in (1, 7, 130)), (2, 1024, ["none", "layer"])],
)
@pytest.mark.parametrize("asked", [CAUSAL, BOTH, noisy_of], ids=["causal", "both", "noisy"])
def test_agrees_to_twelve_digits_in_float64(asked, B, T, policies):
    told = asked(B) if callable(asked) else asked
    layer = OneLayer(B, T, 16, 2, hidden=24, rotated=True, dtypes=(F64,) * 3)
    exact = layer.exact(**told)
    for recompute in policies:
        for name, value in layer.with_grads(recompute=recompute, **told).items():
            # of sums over all tokens, the digits that the largest has
            error = (value - exact[name]).abs().max()
            assert error <= 1e-12 * exact[name].abs().max().clamp_min(1), (recompute, name)


@pytest.mark.parametrize(
    ("dtypes", "per_token"),
    [((F32,) * 3, True), ((F32,) * 3, False), ((BF16,) * 3, False), ((F32, BF16, BF16), True)],
    ids=str,
)
@pytest.mark.parametrize("asked", [CAUSAL, BOTH, noisy_of(4)], ids=["causal", "both", "noisy"])
def test_as_accurate_as_eager_and_policies_give_the_same_bits(asked, dtypes, per_token):
    options = {"rotated": True, "per_token": per_token, "mlp": "swiglu", "norm": "rms"}
    layer = OneLayer(4, 37, 128, 1, hidden=160, **options, dtypes=dtypes)
    first, *others = (layer.with_grads(recompute=recompute, **asked) for recompute in SAME_BITS)
    for result in others:
        assert_same_bits(result, first)
    layer.assert_as_accurate_as_eager(first, **asked)


def moved_by(token, op, told):
    """(B, T): whether a token's result is another when one token's x is."""
    layer = OneLayer(4, 6, dtypes=(F64,) * 3)
    before = layer.run(layer.tensors, op, **told)
    layer.tensors["x"][token] += torch.randn(24)  # a norm would not see a constant
    return (layer.run(layer.tensors, op, **told) != before).any(-1)


# samples 0 and 1 are noisy, 2 and 3 clean
@pytest.mark.parametrize(
    "run", [*EVERY_POLICY, reference.adaln_layer], ids=[*EVERY_POLICY, "reference"]
)
@pytest.mark.parametrize("place", [0, 2, 5])
def test_a_token_moves_those_alone_that_see_it(place, run):
    op = run if callable(run) else partial(adaln_layer, recompute=run)
    places = torch.arange(6)
    own, later, nothing = places == place, places >= place, places > 5
    expected = {
        (0, False): [own, nothing, nothing, nothing],
        (3, False): [nothing, later, nothing, later],
        (1, True): [nothing, own],
        (2, True): [later, nothing],
    }
    for (sample, fewer), rows in expected.items():
        told = noisy_of(4) if fewer else BOTH
        assert torch.equal(moved_by((sample, place), op, told), torch.stack(rows)), sample
    rows = [nothing, later, nothing, nothing]
    assert torch.equal(moved_by((1, place), op, CAUSAL), torch.stack(rows))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("recompute", SAME_BITS)
def test_a_clean_stream_that_is_keys_and_values_alone_changes_no_noisy_bit(
    recompute, dtype, per_token
):
    options = {"per_token": per_token, "rotated": True, "dtypes": (dtype,) * 3}
    layers = [OneLayer(6, 33, 64, 2, hidden=96, **options) for _ in range(2)]
    results = []
    for told in (BOTH, noisy_of(6)):
        stream, leaves = ResidualStream(), [layer.leaves() for layer in layers]
        x = layers[0].run(leaves[0], stream=stream, recompute=recompute, **BOTH)
        leaves[1]["x"] = x
        out = layers[1].run(leaves[1], stream=stream, recompute=recompute, **told)[:3]
        named = {
            f"{i} {n}": t for i in range(2) for n, t in leaves[i].items() if i == 0 or n != "x"
        }
        dout = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape).to(dtype)
        results.append((out, gradients(out, named, dout)))
    (whole, expected), (fewer, actual) = results
    assert torch.equal(fewer, whole)
    for name, grad in expected.items():
        # a sum of one part fewer, or of the same parts in another order
        allowed = 8 * torch.finfo(dtype).eps * grad.abs().max()
        assert (actual[name] - grad).abs().max() <= allowed, name
