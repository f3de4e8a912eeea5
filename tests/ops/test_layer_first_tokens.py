"""A layer of whose tokens only the first are asked for."""

import pytest
import torch
from ops.one_layer import ALL_OPTIONS, EVERY_POLICY, SAME_BITS, OneLayer, assert_same_bits, saved_by
from torch._subclasses.fake_tensor import FakeTensorMode

from dbkernels.ops import POLICIES, adaln_layer, reference, use_implementation
from dbkernels.ops.layer.tensors import ResidualStream

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
T = 5
DTYPES = [(F32,) * 3, (BF16,) * 3, (F32, BF16, BF16)]
# every two choices of any two options meet in one of these
SOME_OPTIONS = [ALL_OPTIONS[i] for i in (0, 9, 22, 27, 36, 45, 50, 63)]
SHARED = {"qk_norm": False}  # the published ViT's: a condition of each sample
EACH = {"qk_norm": True, "rotated": True, "per_token": True, "mlp": "swiglu"}


def sliced(*args, num_queries, **options):
    return adaln_layer(*args, **options)[:, :num_queries]


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            actual[name], value, rtol=1e-11, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("options", ALL_OPTIONS, ids=str)
def test_agrees_with_the_first_of_all_at_every_policy(options):
    layer = OneLayer(**options, dtypes=(F64,) * 3)
    for num_queries in (1, T - 1):
        exact = layer.with_grads(reference.adaln_layer, num_queries=num_queries)
        assert exact["out"].shape == (2, num_queries, 24)
        for recompute in EVERY_POLICY:
            assert_close(layer.with_grads(recompute=recompute, num_queries=num_queries), exact)
            assert_close(
                layer.with_grads(sliced, recompute=recompute, num_queries=num_queries), exact
            )


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("options", SOME_OPTIONS, ids=str)
def test_as_accurate_as_eager(options, dtypes):
    layer = OneLayer(3, 37, 128, 1, hidden=160, **options, dtypes=dtypes)
    results = [layer.with_grads(recompute=recompute, num_queries=19) for recompute in EVERY_POLICY]
    assert results[0]["out"].dtype == dtypes[0]
    for result in results[1 : len(SAME_BITS)]:
        assert_same_bits(result, results[0])
    layer.assert_as_accurate_as_eager(results[0], num_queries=19)


@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
def test_kernels_are_as_accurate_as_eager(options):
    layer = OneLayer(2, T, 24, 2, **options)
    with use_implementation("triton"):
        result = layer.with_grads(num_queries=2)
    layer.assert_as_accurate_as_eager(result, num_queries=2)


@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
def test_autocast_is_as_accurate_as_eagers(options):
    def in_autocast(op):
        def f(*args, **options):
            with torch.autocast("cpu", BF16):
                return op(*args, **options)

        return f

    layer = OneLayer(3, 37, 128, 1, hidden=160, **options)
    results = [
        layer.with_grads(in_autocast(adaln_layer), recompute=k, num_queries=19)
        for k in EVERY_POLICY
    ]
    for result in results:
        assert {t.dtype for t in result.values()} == {F32}
    for result in results[: len(SAME_BITS)]:
        assert_same_bits(result, results[0])
    eager = layer.with_grads(in_autocast(reference.adaln_layer), num_queries=19)
    layer.compare([results[0], results[-1]], eager, num_queries=19)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
def test_all_tokens_by_number_give_the_same_bits_and_keep_the_same(options, recompute):
    layer = OneLayer(**options)
    assert_same_bits(
        layer.with_grads(recompute=recompute, num_queries=T), layer.with_grads(recompute=recompute)
    )
    leaves = layer.leaves()
    shapes = [
        sorted(
            tuple(t.shape)
            for t in saved_by(lambda n=n: layer.run(leaves, recompute=recompute, num_queries=n))[
                1
            ].values()
        )
        for n in (None, T)
    ]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_what_the_others_do_not_need_is_not_kept(recompute, num_queries, per_token):
    B, T, D, H, hidden = 2, 64, 192, 3, 768
    layer = OneLayer(B, T, D, H, hidden=hidden, per_token=per_token, rotated=True)
    leaves = layer.leaves()
    _, kept = saved_by(lambda: layer.run(leaves, recompute=recompute, num_queries=num_queries))
    for name, leaf in leaves.items():
        if name != "x":
            kept.pop(leaf.untyped_storage().data_ptr(), None)
    sizes = {
        "stats1": 2 * T,
        "q": num_queries * D,
        "qkv": T * 2 * D,
        "attended": num_queries * D,
        "logsumexp": num_queries * H,
        "a": num_queries * D,
        "stats2": 2 * num_queries,
        "hidden": num_queries * hidden,
        "m": num_queries * D,
    }
    x_and_rotary = B * T * D + 2 * T * (D // H)
    expected = x_and_rotary + B * sum(sizes[name] for name in POLICIES[recompute].keeps)
    assert sum(t.untyped_storage().nbytes() for t in kept.values()) == 4 * expected


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_a_token_that_is_not_asked_for_is_still_attended_to(recompute):
    layer = OneLayer(dtypes=(F64,) * 3)
    changed = {**layer.tensors, "x": layer.tensors["x"].clone()}
    changed["x"][:, -1] *= -1
    before, after = (
        layer.with_grads(tensors=t, recompute=recompute, num_queries=1)
        for t in (layer.tensors, changed)
    )
    assert not torch.allclose(before["out"], after["out"], atol=1e-3)
    assert before["x"].any(-1).all()


def test_the_others_conditions_get_no_gradient_of_what_was_not_computed():
    layer = OneLayer(per_token=True)
    gradient = layer.with_grads(num_queries=2)["modulation"].unflatten(-1, (6, -1))
    assert gradient[:, :2].any(-1).all()
    # shift1 and scale1 act on keys and values too
    assert gradient[:, 2:, :2].any(-1).all() and not gradient[:, 2:, 2:].any()


@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_a_retained_graph_gives_the_same_bits_again(recompute, options):
    layer = OneLayer(**options)
    leaves = layer.leaves()
    y = layer.run(leaves, recompute=recompute, num_queries=2).sum()
    first, again, last = (
        torch.autograd.grad(y, list(leaves.values()), retain_graph=retain)
        for retain in (True, True, False)
    )
    for bits, *others in zip(first, again, last, strict=True):
        assert all(torch.equal(other, bits) for other in others)


# kept tensors that become gradients of their own: q and the keys and values, where no norm of
# theirs is read again
@pytest.mark.parametrize(
    ("qk_norm", "widths"), [(False, [24, 24, 24, 40, 48]), (True, [24, 24, 40])]
)
def test_the_last_backward_writes_over_what_was_kept(qk_norm, widths):
    layer = OneLayer(qk_norm=qk_norm, rotated=True)
    leaves = layer.leaves()
    y, kept = saved_by(lambda: layer.run(leaves, num_queries=2))
    before = {address: t.detach().clone() for address, t in kept.items()}
    y.sum().backward()
    changed = [t for address, t in kept.items() if not torch.equal(t, before[address])]
    assert sorted(t.shape[-1] for t in changed) == widths


@pytest.mark.parametrize("frozen", ["x", "modulation", "qkv_weight", "qkv_bias", "fc1_weight"])
def test_what_is_frozen_changes_no_other(frozen):
    layer = OneLayer()
    expected, leaves = layer.with_grads(num_queries=2), layer.leaves()
    leaves[frozen].requires_grad_(False)
    y = layer.run(leaves, num_queries=2)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=F64).view_as(y).to(y))
    assert leaves[frozen].grad is None
    for name, leaf in leaves.items():
        assert name == frozen or torch.equal(leaf.grad, expected[name]), name


def test_gradients_are_those_of_differences():
    layer = OneLayer(1, 3, 4, 2, hidden=3, **EACH, dtypes=(F64,) * 3)
    names, values = list(layer.tensors), list(layer.leaves().values())

    def f(*values):
        return layer.run(dict(zip(names, values, strict=True)), num_queries=2)

    torch.autograd.gradcheck(f, values)


@pytest.mark.parametrize("options", [SHARED, EACH], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_empty_batch(recompute, options):
    layer = OneLayer(0, T, **options)
    result = layer.with_grads(recompute=recompute, num_queries=2)
    assert result.pop("out").shape == (0, 2, 24)
    for name, grad in result.items():
        assert torch.equal(grad, torch.zeros_like(layer.tensors[name])), name


@pytest.mark.parametrize("per_token", [False, True])
def test_x_and_modulation_may_have_any_strides(per_token):
    layer = OneLayer(per_token=per_token)
    dense = layer.with_grads(num_queries=2)
    for name in ("x", "modulation"):
        t = layer.tensors[name]
        layer.tensors[name] = torch.cat([t, t], dim=-1)[..., : t.shape[-1]]
    assert_same_bits(layer.with_grads(num_queries=2), dense)


@pytest.mark.parametrize("recompute", ["none", "qkv"])
def test_ends_a_stream_and_another_layer_may_follow(recompute):
    layer = OneLayer(dtypes=(F64,) * 3)

    def stack(follow):
        def f(x, *args, **options):
            stream = ResidualStream() if follow else None
            for num_queries in (None, None, 3, 2):
                x = adaln_layer(
                    x, *args, **options, recompute=recompute, stream=stream, num_queries=num_queries
                )
            return x

        return layer.with_grads(f)

    assert stack(True)["out"].shape == (2, 2, 24)
    assert_same_bits(stack(True), stack(False))


def test_the_last_layer_of_a_stream_keeps_no_x_of_its_own():
    layer = OneLayer(qk_norm=False)
    leaves = layer.leaves()

    def kept_bytes(follow):
        def f(x, *args, **options):
            stream = ResidualStream() if follow else None
            middle = adaln_layer(x, *args, **options, stream=stream)
            return adaln_layer(middle, *args, **options, stream=stream, num_queries=1)

        _, kept = saved_by(lambda: layer.run(leaves, f))
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    assert kept_bytes(False) - kept_bytes(True) == leaves["x"].nbytes


def test_compiles_without_graph_breaks():
    layer = OneLayer(**EACH)
    compiled = torch.compile(adaln_layer, backend="aot_eager", fullgraph=True)
    result = layer.with_grads(compiled, num_queries=2)
    for name, expected in layer.with_grads(num_queries=2).items():
        torch.testing.assert_close(result[name], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_has_shapes_before_it_has_data(recompute):
    layer = OneLayer(**{**EACH, "rotated": False})
    with FakeTensorMode() as mode:
        leaves = {
            name: torch.empty(t.shape, dtype=t.dtype).requires_grad_()
            for name, t in layer.tensors.items()
        }
        y = layer.run(leaves, recompute=recompute, num_queries=2)
        assert y.shape == (2, 2, 24) and y.fake_mode is mode
        y.sum().backward()
        assert all(leaf.grad.shape == leaf.shape for leaf in leaves.values())


@pytest.mark.parametrize("num_queries", [0, -1, T + 1, 2.0])
@pytest.mark.parametrize("recompute", ["none", "layer"])
def test_rejects(recompute, num_queries):
    layer = OneLayer()
    message = f"num_queries must be an integer from 1 to T = 5, or None, got {num_queries}"
    with pytest.raises(ValueError, match=message):
        layer.run(layer.tensors, recompute=recompute, num_queries=num_queries)


def test_the_specification_computes_all_and_takes_the_first():
    layer = OneLayer(dtypes=(F64,) * 3)
    whole = layer.run(layer.tensors, reference.adaln_layer)
    for num_queries in (1, T, None):
        some = layer.run(layer.tensors, reference.adaln_layer, num_queries=num_queries)
        assert torch.equal(some, whole[:, :num_queries])
