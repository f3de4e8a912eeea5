"""What a layer and a head keep for their backward, and which tensors exist at the same time."""

from collections import Counter
from functools import partial
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from ops.one_layer import (
    EVERY_POLICY,
    KINDS,
    OneLayer,
    Ops,
    assert_same_bits,
    gradients,
    in_autocast,
    saved_by,
    saved_bytes,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from dbkernels.memory.measure import measure_peak
from dbkernels.ops import POLICIES, adaln_layer, linear_cross_entropy, reference, use_implementation
from dbkernels.ops.backend.register import dry_run_on_gpu
from dbkernels.ops.layer import passes
from dbkernels.ops.layer.mlp import CHUNK
from dbkernels.ops.layer.part import Wanted
from dbkernels.ops.layer.recompute import Recompute, policies_of

F32, BF16 = torch.float32, torch.bfloat16
B, T, D, H = 2, 64, 192, 3


def kept_bytes(layer, op=adaln_layer, **options):
    """Of all that autograd keeps beside the weights, the modulation and the rotary table."""
    leaves = layer.leaves()
    given = [*(t for name, t in leaves.items() if name != "x"), layer.options["rotary"]]
    but = [t for t in given if t is not None]
    return saved_bytes(lambda: layer.run(leaves, op, **options), but=but)


# a condition of each token is kept no other way
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtypes", [(F32,) * 3, (BF16,) * 3, (F32, BF16, BF16)], ids=str)
@pytest.mark.parametrize("asked", [*({"num_queries": n} for n in (1, 3, T)), *KINDS], ids=str)
@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_keeps_what_its_policy_says_and_of_what_is_wanted_alone(
    recompute, asked, dtypes, per_token
):
    layer = OneLayer(
        B, T, D, H, hidden=4 * D, rotated=True, per_token=per_token, dtypes=dtypes
    )  # fmt: skip
    N, policy = asked.get("num_samples", B) * asked.get("num_queries", T), POLICIES[recompute]
    elements = {"q": N * D, "qkv": 2 * B * T * D, "attended": N * D, "a": N * D, "m": N * D}
    elements["hidden"] = 4 * N * D
    of_float32 = {"stats1": 2 * B * T, "logsumexp": H * N, "stats2": 2 * N}
    large, small = (
        sum(sizes[n] for n in policy.keeps & sizes.keys()) for sizes in (elements, of_float32)
    )
    x_dtype, _, dtype = dtypes
    x_bytes = B * T * D * (dtype if policy.narrow else x_dtype).itemsize
    expected = x_bytes + large * dtype.itemsize + small * 4
    assert kept_bytes(layer, recompute=recompute, **asked) == expected
    assert N < B * T or B * T * D + large == policy.units * B * T * D


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_all_tokens_by_number_keep_and_give_the_same(recompute):
    leaves = (layer := OneLayer(rotated=True)).leaves()
    (y, kept), (whole, expected) = (
        saved_by(lambda n=n: layer.run(leaves, recompute=recompute, num_queries=n))
        for n in (5, None)
    )
    assert [t.shape for t in kept.values()] == [t.shape for t in expected.values()]
    assert_same_bits(gradients(y.sum(), leaves), gradients(whole.sum(), leaves))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_eager_keeps_twenty(dtype):
    layer = OneLayer(B, T, D, H, hidden=4 * D, qk_norm=False, dtypes=(dtype,) * 3)
    units = kept_bytes(layer, reference.adaln_layer) / (B * T * D * dtype.itemsize)
    assert 20 <= units < 20.2


def test_policies_go_from_most_memory_to_least():
    policies = list(POLICIES.values())
    assert list(POLICIES) == list(get_args(Recompute))  # a config can name each
    assert [policy.units for policy in policies] == [11, 10, 7, 4, 1, 1]
    assert len({policy.recomputes for policy in policies}) == len(policies)
    # queries of a tensor of their own go where keys and values go
    assert all(("q" in policy.keeps) == ("qkv" in policy.keeps) for policy in policies)
    # where nothing is rounded the last policy is the one before
    assert policies_of(mixed=True) == tuple(EVERY_POLICY)
    assert policies_of(mixed=False) == tuple(EVERY_POLICY[:-1])


@pytest.mark.parametrize("samples", [1, None])
@pytest.mark.parametrize("tokens", [1, 4, None])
@pytest.mark.parametrize("B", [1, 2])
def test_the_first_hold_no_memory_of_the_others(B, tokens, samples):
    x, wanted = torch.randn(B, 5, 3), Wanted(samples, tokens)
    first, expected = wanted.alone(x), x[:samples, :tokens]
    assert torch.equal(first, expected) and (first is x) == (tokens is samples is None)
    assert first.is_contiguous() and first.untyped_storage().nbytes() == 4 * expected.numel()


def test_autocast_keeps_no_copy_of_the_weights():
    leaves = (layer := OneLayer()).leaves()
    _, kept = saved_by(lambda: layer.run(leaves, in_autocast(adaln_layer)))
    for leaf in leaves.values():
        assert kept.pop(leaf.untyped_storage().data_ptr()).dtype == F32
    # qkv, attended, a, hidden and m; logsumexp and the statistics of two norms
    assert Counter(t.dtype for t in kept.values()) == {BF16: 5, F32: 3}


def test_each_tensor_dies_with_its_last_use(monkeypatch):
    held, gone = {}, {}

    def watch(room, name, *, args, ask):
        original = getattr(room, name)

        def watched(*given, **options):
            gone[name] = [what for what in ask if held[what].expired()]
            for what, tensor in args.items():
                held[what] = StorageWeakRef(tensor(*given).untyped_storage())
            return original(*given, **options)

        monkeypatch.setattr(room, name, watched)

    mlp = {"dm": lambda dm, *rest: dm, "hidden": lambda *given: given[5]["hidden"]}
    attention = {"attended": lambda _, das, qkvs, kept, *rest: kept[0]["attended"]}
    watch(passes, "mlp_backward", args=mlp, ask=[])
    watch(passes, "gated_adaln_norm_backward", args={}, ask=["dm", "hidden"])
    watch(passes, "attend_backward", args=attention, ask=["dm", "hidden"])
    watch(passes, "adaln_norm_backward", args={}, ask=["attended"])
    leaves = (layer := OneLayer()).leaves()
    gradients(layer.run(leaves).sum(), leaves)
    # dy is written over dm
    assert gone["gated_adaln_norm_backward"] == []
    assert gone["attend_backward"] == ["dm", "hidden"]
    assert gone["adaln_norm_backward"] == ["attended"]


def peak_bytes(layer, *, retain_graph=False, backward=True, **options):
    leaves = layer.leaves()

    def step():
        y = layer.run(leaves, **options)
        if backward:
            gradients(y.sum(), leaves, retain_graph=retain_graph)

    return measure_peak(step, model=nn.Module(), inputs=list(leaves.values())).total_bytes


def test_gradients_written_over_what_was_kept_lower_the_peak():
    layer, hidden_bytes = OneLayer(qk_norm=False), 2 * 5 * 40 * 4
    assert peak_bytes(layer) <= peak_bytes(layer, retain_graph=True) - hidden_bytes
    # what was computed again has no other owner, whoever retains the graph
    again = {"recompute": "layer"}
    assert peak_bytes(layer, **again) == peak_bytes(layer, **again, retain_graph=True)


def test_a_few_samples_at_a_time_lower_the_peak(monkeypatch):
    def peaks():
        steps = ("layer", True, 0.7), ("layer", False, 0.7), ("qkv", True, 0.9)
        return [(share, peak_bytes(layer, recompute=r, backward=b)) for r, b, share in steps]

    layer = OneLayer(64)
    whole = peaks()
    monkeypatch.setattr(passes, "PART", 10)
    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", 10)
    for (_, part), (share, bytes_of_all) in zip(peaks(), whole, strict=True):
        assert part < share * bytes_of_all


@pytest.mark.parametrize("mlp", ["gelu", "swiglu"])
def test_the_temporaries_of_a_chunk_die_before_the_next_has_its_own(mlp, monkeypatch):
    def peak_beside(tokens):
        layer = OneLayer(1, tokens, 2, 1, hidden=4000, mlp=mlp, bias=False, qk_norm=False)
        return peak_bytes(layer, recompute="mlp")

    monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", 100)
    # three chunks have longer streams than one, but no chunk of the hidden layer more
    assert peak_beside(300) - peak_beside(100) < 4 * 100 * 4000 / 2


def calls_on_gpu(samples, tokens, op_names, *, backward=True, recompute="none", **options):
    """The name and the tokens of each call of some ops, in a layer that runs as on a GPU."""
    layer = OneLayer(**options)
    layer.tensors["x"] = layer.tensors["x"][:1, :1].expand(samples, tokens, -1)
    layer.tensors["modulation"] = layer.tensors["modulation"][:1].expand(samples, -1)
    with FakeTensorMode(), dry_run_on_gpu(132), Ops() as seen:
        leaves = {
            name: torch.empty(t.shape, dtype=t.dtype).requires_grad_()
            for name, t in layer.tensors.items()
        }
        y = layer.run(leaves, recompute=recompute)
        if backward:
            gradients(y.sum(), leaves)
    return [
        (name, shapes[name == "_addmm_activation"][:-1].numel())
        for name, shapes in seen.calls
        if name in op_names
    ]


@pytest.mark.parametrize(
    ("tokens", "sizes", "op", "options"),
    [
        (2 * CHUNK, [2 * CHUNK], "gelu_fwd", {}),
        (2 * CHUNK + 2, [2 * CHUNK, 2], "gelu_fwd", {}),
        (8 * CHUNK, [4 * CHUNK] * 2, "gelu_fwd", {}),
        # nobody keeps what GELU reads, so the matmul gives GELU itself
        (8 * CHUNK, [4 * CHUNK] * 2, "_addmm_activation", {"recompute": "mlp"}),
        # the pre-activation, which is not kept, and the activation
        (2 * CHUNK, [CHUNK] * 2, "gelu_fwd", {"recompute": "mlp", "bias": False}),
        (8 * CHUNK, [2 * CHUNK] * 4, "gelu_fwd", {"recompute": "mlp", "bias": False}),
        (4, [4], "swiglu_fwd", {"recompute": "mlp", "mlp": "swiglu"}),
        # no matmul of a GPU gives it
        (4, [4], "gelu_exact_fwd", {"recompute": "mlp", "mlp": "gelu_exact"}),
        (4, [4], "gelu_fwd", {"recompute": "mlp", "dtypes": (F32,) * 3}),
        (4, [4], "gelu_fwd", {"recompute": "mlp", "dtypes": (torch.float16,) * 3}),
    ],
)
def test_an_mlp_on_a_gpu_has_chunks_that_leave_the_peak_where_it_is(tokens, sizes, op, options):
    names = ("gelu_fwd", "gelu_exact_fwd", "swiglu_fwd", "_addmm_activation")
    options = {"dtypes": (BF16,) * 3, **options}
    assert calls_on_gpu(1, tokens, names, backward=False, **options) == [(op, n) for n in sizes]


def test_a_matmul_of_a_cpu_does_not_give_gelu():
    layer = OneLayer(dtypes=(BF16,) * 3)
    with Ops() as seen:
        layer.run(layer.tensors, recompute="mlp")
    assert {"gelu_fwd"} == {name for name, _ in seen.calls} & {"gelu_fwd", "_addmm_activation"}


@pytest.mark.parametrize(
    ("recompute", "sizes"), [("qkv", [8192, 8192, 4096]), ("layer", [4096] * 5), ("none", [20480])]
)
def test_a_gpu_makes_again_as_many_tokens_at_once_as_leave_the_peak_where_it_is(recompute, sizes):
    calls = calls_on_gpu(5, 4096, ["adaln_norm_bwd"], recompute=recompute)
    assert [tokens for _, tokens in calls] == sizes


DTYPES = [torch.float32, torch.bfloat16]


def eager(x, weight, target, *, bias, reduction):
    return F.cross_entropy(F.linear(x, weight, bias).float(), target, reduction=reduction)


def head_peak_bytes(f, tokens, V, D, dtype, reduction="mean"):
    """Forward and backward; gradients of x and of the head count."""
    head = nn.Linear(D, V, bias=False, dtype=dtype)
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    target = torch.zeros(tokens, dtype=torch.int64)

    def step():
        f(x, head.weight, target, bias=None, reduction=reduction).sum().backward()

    peak = measure_peak(step, model=head, inputs=[x, target])
    return peak.total_bytes - peak.by_category["parameters"] - peak.by_category["inputs"]


@pytest.mark.parametrize(
    ("size", "where"),
    [
        ((2048, 5003, 64), partial(use_implementation, "torch")),
        ((16384, 50257, 768), FakeTensorMode),
    ],
    ids=["measured on a small head", "predicted for GPT-2"],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_is_under_a_twentieth_of_eagers(size, where, dtype, reduction):
    with where():
        ours, eagers = (
            head_peak_bytes(f, *size, dtype, reduction) for f in (linear_cross_entropy, eager)
        )
    assert ours < eagers / 20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_peak_is_the_gradients_and_one_chunk(dtype):
    tokens, V, D, width = 16384, 50257, 768, torch.finfo(dtype).bits // 8
    chunk, padded = 1024, 50304
    gradients = tokens * D * width + V * D * 4  # of x, and of the weight in float32
    logits = chunk * padded * width
    if width < 4:
        logits += chunk * V * 4  # a CPU multiplies in float32 to sum in float32
    with FakeTensorMode():
        peak = head_peak_bytes(linear_cross_entropy, tokens, V, D, dtype)
    assert 0 <= peak - gradients - logits <= 2**22  # what a token or a chunk has
