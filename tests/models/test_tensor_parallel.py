"""Ranks that share layers have the numbers of one process, each a part of them."""

import copy
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from models.shared_layers import (
    CASES,
    CONFIG,
    EVERY_POLICY,
    MODELS,
    TABLE,
    B,
    D,
    H,
    T,
    blocks_of,
    model_results,
)
from models.tiny import DRAW, make_model
from models.two_ranks import HALVES, IN_PARTS, LEFT_OUT, SHARDED, SIZE, work
from ops.one_layer import Ops, saved_bytes
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from dbkernels.memory.tracker import Tracker
from dbkernels.models import AdaLNLayer, add_adapters
from dbkernels.models.baseline import use_baseline
from dbkernels.models.cached import cached_layer
from dbkernels.models.tensor_parallel import cut_layer, cuts
from dbkernels.ops import Adapter, Stacked, adaln_layer, joint_layer, linear

ARGS = list(CASES["gelu"].inputs().values())
CACHE = torch.zeros(2, B, H // SIZE, T, D // H).double()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Of each rank, tensors by way, case, policy and name."""
    folder = tmp_path_factory.mktemp("ranks")
    args = f"file://{folder / 'rendezvous'}", str(folder / "results")
    torch.multiprocessing.spawn(work, args=args, nprocs=HALVES * SIZE)
    return [load_file(f"{args[1]}{rank}") for rank in range(SIZE)]


@pytest.fixture(scope="module")
def alone():
    """A group whose other ranks are not there: what they would add is missing."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=SIZE)
    yield dist.group.WORLD
    dist.destroy_process_group()


def of_rank(found, way):
    prefix = f"{way}/"
    return {key.removeprefix(prefix): t for key, t in found.items() if key.startswith(prefix)}


def joined(found, way, how):
    """The results of a way by name; what is not cut is the same on every rank, bit for bit."""
    each = [of_rank(own, way) for own in found]
    assert all(own.keys() == each[0].keys() for own in each)
    results = {}
    for name in each[0]:
        slices = [own[name] for own in each]
        if name in how:
            results[name] = how[name].join(slices)
        else:
            assert all(torch.equal(own, slices[0]) for own in slices), name
            results[name] = slices[0]
    return results


def assert_same(actual, expected, tolerance):
    assert actual.keys() == expected.keys()
    for name, t in expected.items():
        size = t.abs().max().clamp(min=1).item()
        torch.testing.assert_close(
            actual[name], t, rtol=0, atol=tolerance * size,
            msg=lambda message, name=name: f"{name}: {message}",
        )  # fmt: skip


def whole_and_joined(found, way, case):
    layer = CASES[case].layer()
    return CASES[case].results(layer), joined(found, way, cuts(layer))


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("case", CASES)
def test_ranks_have_the_output_and_gradients_of_one_process(case, recompute, found):
    whole, parts = whole_and_joined(found, f"whole batch/{case}/{recompute}", case)
    assert_same(parts, whole, 1e-12)


@pytest.mark.parametrize(("case", "recompute"), IN_PARTS)
def test_so_they_have_in_several_chunks_and_parts(case, recompute, found):
    whole, parts = whole_and_joined(found, f"in parts/{case}/{recompute}", case)
    assert_same(parts, whole, 1e-12)


@pytest.mark.parametrize("recompute", EVERY_POLICY)
def test_branches_in_bfloat16_are_as_accurate_as_those_of_one_process(recompute, found):
    exact, parts = whole_and_joined(found, f"autocast/norms/{recompute}", "norms")
    with torch.autocast("cpu", torch.bfloat16):
        layer = CASES["norms"].layer(recompute, torch.float32)
        given = {name: t.float() for name, t in CASES["norms"].inputs().items()}
        whole = CASES["norms"].results(layer, given)
    for name, t in exact.items():
        assert parts[name].dtype == torch.float32
        errors = [(results[name] - t).norm() / t.norm() for results in (parts, whole)]
        assert errors[0] < 2 * errors[1] + 1e-3, name


@pytest.mark.parametrize("what", LEFT_OUT)
def test_no_sum_can_be_left_out(what, found):
    way = f"without {what}/norms/none"
    whole, name = CASES["norms"].results(CASES["norms"].layer()), "attention.q_norm.weight"
    own = of_rank(found[0], way)
    assert not torch.allclose(own[name], whole[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("recompute", ["none", "layer"])
@pytest.mark.parametrize("case", SHARDED)
def test_shared_layers_may_be_sharded_over_halves_of_a_batch(case, recompute, found):
    whole, parts = whole_and_joined(found, f"sharded/{case}/{recompute}", case)
    for name in parts:
        if name in whole.keys() - dict(CASES[case].layer().named_parameters()):
            whole[name] = whole[name][: B // HALVES]
        else:
            # averaged over the halves, and the loss is a sum over samples
            parts[name] = HALVES * parts[name]
    assert_same(parts, whole, 1e-12)


@pytest.mark.parametrize("family", MODELS)
def test_a_model_of_shared_layers_has_the_loss_and_gradients_of_one_process(family, found):
    blocks = blocks_of(family)
    how = {
        f"layers.{place}.{name}": cut
        for place, layer in enumerate(blocks.model.layers)
        for name, cut in cuts(layer).items()
    }
    whole = model_results(blocks)
    cut, depth = sum(name in how for name in whole), len(blocks.model.layers)
    assert cut >= 4 * depth // 2
    assert_same(joined(found, f"model/{family}/none", how), whole, 1e-6)


@pytest.mark.parametrize("case", CASES)
def test_a_cut_layer_has_its_rank_s_slices_by_the_same_names(case, alone):
    whole, layer = CASES[case].layer(), CASES[case].layer()
    layer.requires_grad_(False)
    how = cuts(layer)
    cut_layer(layer, alone)
    assert cuts(layer) == how
    assert layer.state_dict().keys() == whole.state_dict().keys()
    assert not any(p.requires_grad for p in layer.parameters())
    for name, p in whole.named_parameters():
        expected = how[name].of(p, 1, SIZE) if name in how else p
        assert torch.equal(layer.get_parameter(name), expected), name
        is_shared = name.split(".")[-2] in ("q_norm", "k_norm", "norm1", "norm2")
        is_last = name.endswith(("out.bias", "fc2.bias"))
        assert (name in how) != (is_shared or is_last), name
    for module in layer.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == module.weight.shape


# sums of a forward, those of its backward, and how many more where it runs again
SUMS = {
    "gelu": (2, 2 + 1, 2),
    "norms": (2, 2 + 1 + 1, 2),
    "num_queries": (2, 2 + 1 + 1, 2),
    "condition of tokens": (2, 2 + 1 + 1, 2),
    "parallel": (1, 1 + 1 + 1, 1),
    "cross": (3, 4 + 1, 3),
    "joint": (5, 5 + 2 + 3, 5),
    "keys": (2, 3 + 2 + 2, 2),
}


@pytest.mark.parametrize("recompute", EVERY_POLICY)
@pytest.mark.parametrize("case", SUMS)
def test_only_what_runs_again_is_summed_again(case, recompute, alone):
    layer, given = CASES[case].layer(recompute), CASES[case].inputs()
    cut_layer(layer, alone)
    given = {name: t.requires_grad_() for name, t in given.items()}
    with Ops() as ahead:
        out = CASES[case].run(layer, given)
    with Ops() as back:
        out.sum().backward()
    ahead, back = (Counter(name for name, _ in ops.calls) for ops in (ahead, back))
    forward, backward, again = SUMS[case]
    runs_again = recompute in ("layer", "layer_narrow")
    assert ahead["allreduce_"] == forward
    assert back["allreduce_"] == backward + again * runs_again
    gathered = 2 if case in ("joint", "keys") else 1
    assert ahead["allgather_"] == gathered
    # of each token it is made again where it is not kept
    made_again = case == "condition of tokens" and recompute in ("qkv", "layer", "layer_narrow")
    assert back["allgather_"] == made_again


class Work:
    """Notes when it is waited for."""

    def __init__(self, ops):
        self.ops = ops

    def wait(self):
        self.ops.calls.append(("wait", []))


@pytest.mark.parametrize("recompute", ["none", "mlp"])
def test_sums_of_the_mlp_run_beside_matmuls(recompute, alone, monkeypatch):
    layer, given = CASES["gelu"].layer(recompute), CASES["gelu"].inputs()
    cut_layer(layer, alone)
    with Ops() as ops:

        def begin_sum(ranks, t):
            ops.calls.append(("begin", [t.shape]))
            return Work(ops)

        monkeypatch.setattr("dbkernels.ops.layer.ranks.Ranks.begin_sum", begin_sum)
        monkeypatch.setattr("dbkernels.ops.layer.mlp.CHUNK", B * T // 2)
        out = layer(**given)
        ahead, ops.calls = ops.calls, []
        out.sum().backward()
    half = [torch.Size([B * T // 2, D])]
    for calls, after_last in ((ahead, 0), (ops.calls, recompute == "mlp")):
        places = [place for place, (name, _) in enumerate(calls) if name == "begin"]
        waits = [place for place, (name, _) in enumerate(calls) if name == "wait"]
        assert [calls[place][1] for place in places] == [half, half]
        assert len(waits) == 2 and waits[1] == waits[0] + 1 and waits[0] > places[1]
        beside = [name for name, _ in calls[places[0] : places[1]]]
        assert any(name in ("mm", "addmm") for name in beside)
        last = [name for name, _ in calls[places[1] : waits[0]]]
        assert any(name in ("mm", "addmm", "addmm_") for name in last) == after_last


def test_keeps_its_share_of_what_is_cut_and_all_of_width_d(alone):
    def saved(layer):
        given = CASES["gelu"].inputs()
        own = [*given.values(), *layer.parameters()]
        return saved_bytes(lambda: CASES["gelu"].run(layer, given), but=own)

    whole, layer = CASES["gelu"].layer(), CASES["gelu"].layer()
    cut_layer(layer, alone)
    widths, logsumexp = 3 * D + D + CONFIG.mlp_hidden, H
    assert saved(whole) - saved(layer) == B * T * 8 * (widths + logsumexp) // SIZE


@pytest.mark.parametrize("recompute", ["none", "mlp", "layer"])
def test_its_memory_is_predicted_without_numbers(recompute, alone):
    case = CASES["condition of tokens"]

    def trace(layer):
        given = case.inputs(torch.float32)
        with Tracker(torch.device("cpu")) as tracker:
            tracker.tag(layer.parameters(), "parameters")
            tracker.tag(given.values(), "inputs")
            case.run(layer, given).sum().backward()
        return tracker.trace()

    layer = case.layer(recompute, torch.float32)
    cut_layer(layer, alone)
    real = trace(layer)
    with FakeTensorMode():
        layer = case.layer(recompute, torch.float32)
        cut_layer(layer, alone)
        predicted = trace(layer)
    assert real.peak().total_bytes == predicted.peak().total_bytes > 0
    assert [op for op in real.ops if "c10d" in op] == [op for op in predicted.ops if "c10d" in op]


def test_a_copy_of_a_layer_is_shared_by_the_same_ranks(alone):
    layer = CASES["gelu"].layer()
    cut_layer(layer, alone)
    twin = copy.deepcopy(layer)
    assert twin.ranks is layer.ranks and twin.modulation.ranks is layer.ranks
    assert torch.equal(twin(*ARGS), layer(*ARGS))


# what is wrong with a layer, and what of it is told
UNFIT = {
    "num_heads must be a multiple of the group's size 2, got 3": {"num_heads": 3},
    "mlp_hidden must be a multiple of the group's size 2, got 21": {"mlp_hidden": 21},
    "attention_dropout must be 0 on several ranks, got 0.5": {"attention_dropout": 0.5},
}


@pytest.mark.parametrize("message", UNFIT)
def test_layers_that_cannot_be_shared_are_refused_as_they_were(message, alone):
    layer = AdaLNLayer(replace(CONFIG, **UNFIT[message]))
    refused(message, layer, alone)


def refused(message, layer, group):
    before = dict(layer.named_parameters())
    with pytest.raises(ValueError, match=re.escape(message)):
        cut_layer(layer, group)
    after = dict(layer.named_parameters())
    assert all(after[name] is p for name, p in before.items())


def test_layers_that_are_no_longer_as_they_were_made_are_refused(alone):
    adapted, stock = make_model("dit"), make_model("dit")
    add_adapters(adapted, rank=2)
    refused("layer must have no adapters, got some", adapted.layers[1], alone)
    use_baseline(stock, "stock")
    refused("run of a layer on several ranks must be None", stock.layers[1], alone)
    layer = CASES["gelu"].layer()
    cut_layer(layer, alone)
    refused("layer must be whole, got one of 2 ranks", layer, alone)
    refused("a ProcessGroup that this process is in, got None", CASES["gelu"].layer(), None)
    with pytest.raises(ValueError, match=r"or JointLayer, got a Linear"):
        cuts(nn.Linear(2, 2))


def compiled(layer):
    return torch.compile(layer, backend="eager", fullgraph=True)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda layer: layer.stock(*ARGS, None), "ranks must be None in plain torch, got 2 ranks"),
        (lambda layer: torch.export.export(layer, tuple(ARGS)), "ranks must be None in plain"),
        (lambda layer: compiled(layer)(*ARGS), "ranks must be None under torch.compile, got 2"),
        (
            lambda layer: cached_layer(
                layer, ARGS[0], torch.zeros(B, T, 6 * D).double(), TABLE, CACHE, first=0
            ),
            "ranks must be None in plain torch, got 2 ranks",
        ),
    ],
)
def test_other_ways_to_run_a_shared_layer_are_refused(run, message, alone):
    layer = CASES["gelu"].layer()
    cut_layer(layer, alone)
    # a compiler says what it met in an error of its own
    with pytest.raises((ValueError, RuntimeError), match=re.escape(message)):
        run(layer)


def test_the_op_refuses_what_ranks_do_not_share(alone):
    layer, modulation = CASES["gelu"].layer(), torch.zeros(B, 6 * D).double()
    cut_layer(layer, alone)
    weights, told = layer.weights(), layer.config.of_op()
    of_qkv = Adapter("qkv", torch.zeros(1, D).double(), torch.zeros(2, 1).double())
    stacked = Stacked((weights.out_weight,))
    unfit = {
        "adapters must be none with ranks, got 1": weights._replace(adapters=(of_qkv,)),
        "out_weight must be a tensor with ranks, got a Stacked": weights._replace(
            out_weight=stacked
        ),
        "attention_dropout must be 0 with ranks, got 0.5": weights,
    }
    for message, given in unfit.items():
        dropped = {"attention_dropout": 0.5, "draw": DRAW} if given is weights else {}
        with pytest.raises(ValueError, match=re.escape(message)):
            adaln_layer(ARGS[0], modulation, given, **told, **dropped)
    small = Adapter("linear", torch.zeros(1, D).double(), torch.zeros(2, 1).double())
    with pytest.raises(ValueError, match="adapters must be none with ranks, got 1"):
        linear(ARGS[0], weights.qkv_weight, None, (small,), layer.ranks)


def test_streams_of_one_attention_have_the_same_ranks(alone):
    layer, given = CASES["joint"].layer(), CASES["joint"].inputs()
    cut_layer(layer, alone)
    of_x, of_context = layer.x.weights(layer.ranks), layer.context.weights(None)
    modulation = torch.zeros(B, 6 * D).double()
    with pytest.raises(ValueError, match=r"context_weights must have the ranks of weights, 2, got"):
        joint_layer(
            given["x"], given["context"], modulation, modulation, of_x, of_context,
            **layer.config.of_op(),
        )  # fmt: skip
