"""A rank of a sharded step, by one process alone and by the allocator of a real rank."""

import json
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from functools import cache

import pytest
import torch
from memory.two_ranks import CASES, DEPTH, WORLD, Layers, resident_bytes, sharded, work
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dbkernels.memory.allocator import MiB, target_named
from dbkernels.memory.measure import predict, record
from dbkernels.memory.plain import copy_of, plain_tensors, where_it_lies
from dbkernels.memory.timeline import snapshot
from dbkernels.memory.tracker import Tracker
from dbkernels.planning.ranks import fake_ranks

CPU = torch.device("cpu")
# every rank has the same but of what the ranks cannot share out evenly
RANKS = [(case, rank) for case in CASES for rank in range(1 + ("ends" in CASES[case]))]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The allocator's peak of each case, by rank."""
    folder = tmp_path_factory.mktemp("ranks")
    args = f"file://{folder / 'rendezvous'}", str(folder)
    torch.multiprocessing.spawn(work, args=args, nprocs=WORLD)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(WORLD)]


@cache
def predicted(case, *, world=WORLD, rank=0):
    """What one process finds of a rank's second step, and what it finds between two steps."""
    with fake_ranks(world, rank):
        mesh = init_device_mesh("cpu", (world,))
        with FakeTensorMode():
            step, owners = sharded(mesh, **CASES[case])
            step()
            return record(step, **owners), resident_bytes(**owners)


@pytest.mark.parametrize("case, rank", RANKS)
def test_one_process_predicts_a_ranks_peak_to_the_byte(case, rank, measured):
    trace, resident = predicted(case, rank=rank)
    assert trace.peak().total_bytes == measured[rank][case]
    assert sum(event.delta_bytes for event in trace.events) == resident
    assert list(trace.moments())[-1].total_bytes == resident


def test_ranks_have_different_shares_of_what_does_not_divide(measured):
    assert measured[0]["qkv, ends"] > measured[1]["qkv, ends"]
    assert measured[0]["qkv"] == measured[1]["qkv"]


# what it is for


def shares(world):
    """Bytes of a rank's share of a layer, and of what the root has; rows are padded to share."""
    model = Layers("none", True)
    layer, *ends = model.layers[0], model.stem, model.head
    bytes_of = [[-(-len(p) // world) * p[0].nbytes for p in m.parameters()] for m in (layer, *ends)]
    return sum(bytes_of[0]), sum(bytes_of[1] + bytes_of[2])


def highest(trace, category):
    return max(moment.by_category[category] for moment in trace.moments())


@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize(
    "case, gathered", [("none", 1), ("none, gathered", DEPTH), ("qkv, ends", 1)]
)
def test_a_gathered_weight_is_a_parameter_and_its_gradient_a_gradient(case, gathered, world):
    trace, _ = predicted(case, world=world)
    layer, ends = shares(world)
    ends *= "ends" in case
    local = DEPTH * layer + ends
    start = next(m for m in trace.moments() if m.op >= 0).by_category
    assert start["parameters"] == local
    assert start["optimizer"] == pytest.approx(2 * local, rel=1e-3)  # and steps
    assert start["inputs"] == sum(t.nbytes for t in sharded(None, **CASES[case])[1]["inputs"])
    assert highest(trace, "parameters") == local + world * (gathered * layer + ends)
    # the last layer's whole gradients, the shares of those before, and the root's head as it came
    head = sum(p.nbytes for p in Layers("none", True).head.parameters()) * ("ends" in case)
    assert highest(trace, "gradients") == (DEPTH - 1) * layer + world * layer + head


@pytest.mark.parametrize("case", ["none", "qkv", "layer, autocast, ends", "none, gathered, ends"])
def test_gathered_weights_are_not_saved_activations(case):
    # a layer of FSDP2 is given other tensors than the layer before it returned, and keeps them
    options = {k: v for k, v in CASES[case].items() if k != "reshard_after_forward"}
    with FakeTensorMode():
        step, owners = sharded(None, **options)
        for layer in owners["model"].layers:
            layer.register_forward_pre_hook(lambda _, args: (args[0].view_as(args[0]), *args[1:]))
        alone = record(step, **owners)
    trace, _ = predicted(case)
    assert trace.saved == alone.saved > 0
    assert highest(trace, "saved_activations") == highest(alone, "saved_activations")
    assert trace.flops == alone.flops


def test_the_buffers_of_collectives_are_temporaries():
    trace, _ = predicted("layer, gathered")
    layer, _ = shares(1)
    gathers = [i for i, op in enumerate(trace.ops) if op.endswith("fsdp::all_gather_copy_in")]
    scatters = [i for i, op in enumerate(trace.ops) if op.endswith("fsdp::chunk_cat")]
    assert len(gathers) == len(scatters) == DEPTH
    for ops in gathers, scatters:
        for op in ops:
            made = [e for e in trace.events if e.op == op - 2 or e.op == op - 1]
            buffers = [trace.categories[e.storage] for e in made if e.delta_bytes == layer]
            assert buffers == ["temporaries"], trace.ops[op - 3 : op + 1]


def test_what_is_gathered_and_reduced_is_in_memory_of_other_streams():
    trace, _ = predicted("none")
    layer, _ = shares(WORLD)
    told = Counter(
        (event.stream, trace.categories[event.storage], event.delta_bytes)
        for event in trace.events
        if event.stream and event.delta_bytes > 0
    )
    # gathered in the forward and in the backward, reduced once
    gathered = {(1, "temporaries", WORLD * layer): 2 * DEPTH}
    assert told == gathered | {(2, "gradients", layer): DEPTH}
    # on a GPU they have segments of their own
    prediction = predict(trace, target_named("h100"))
    one_stream = replace(trace, events=[event._replace(stream=0) for event in trace.events])
    together = predict(one_stream, target_named("h100"))
    assert prediction.peak_allocated_bytes == pytest.approx(together.peak_allocated_bytes, rel=0.1)
    assert prediction.peak_reserved_bytes - together.peak_reserved_bytes >= 20 * MiB
    shown = snapshot(prediction)
    segments = [(s["address"], s["total_size"], s["stream"]) for s in shown["segments"]]
    assert {stream for *_, stream in segments} == {0, 1, 2}
    for entry in shown["device_traces"][0]:
        at, stream = entry["addr"], entry["stream"]
        assert [s for start, size, s in segments if start <= at < start + size] == [stream]


# changes of size


@pytest.mark.parametrize("real", [True, False])
def test_a_storage_that_grows_between_ops_counts_from_then_until_it_shrinks(real):
    with nullcontext() if real else FakeTensorMode():
        empty, x = torch.zeros(0), torch.zeros(10)
        storage = empty.untyped_storage()

        def step():
            x.sum()
            storage.resize_(4000)
            torch.zeros(7)
            storage.resize_(100)
            torch.zeros(5)
            storage.resize_(8)

        trace = record(step, model=nn.Module(), inputs=[x])
    grown = [(e.op, e.delta_bytes) for e in trace.events if trace.categories[e.storage] == "inputs"]
    assert grown == [(-1, 40), (0, 4000), (1, -3900), (2, -92)]


def test_a_storage_is_there_before_it_shrinks():
    x = torch.zeros(10)
    trace = record(lambda: x.untyped_storage().resize_(0), model=nn.Module())
    assert [(e.op, e.delta_bytes) for e in trace.events] == [(-1, 40), (-1, -40)]


@pytest.mark.parametrize("real", [True, False])
def test_other_devices_are_not_counted(real):
    elsewhere = torch.empty(10, device="meta")
    trace = record(lambda: elsewhere.untyped_storage().resize_(400), model=nn.Module())
    assert not trace.events


def test_trackers_in_each_other_see_the_same_and_nothing_stays():
    assert "resize_" not in vars(torch.UntypedStorage)
    x, outer, inner = torch.zeros(10), Tracker(CPU), Tracker(CPU)
    with outer:
        with pytest.raises(RuntimeError, match="within"), inner:
            x.untyped_storage().resize_(80)
            raise RuntimeError("within")
        x.untyped_storage().resize_(60)
    x.untyped_storage().resize_(0)
    assert "resize_" not in vars(torch.UntypedStorage)
    assert [e.delta_bytes for e in inner.trace().events] == [40, 40]
    assert [e.delta_bytes for e in outer.trace().events] == [40, 40, -20]


# what a DTensor holds


def test_a_sharded_tensor_holds_its_share():
    with fake_ranks(4):
        layer = nn.Linear(8, 16)
        fully_shard(layer, mesh=init_device_mesh("cpu", (4,)))
        weight = layer.weight
        assert [(n, tuple(t.shape)) for n, t in plain_tensors("w", weight)] == [
            ("w._local_tensor", (4, 8))
        ]
        copy = copy_of(weight)
        assert type(copy) is type(weight) and copy.shape == (16, 8)
        assert copy.device_mesh is weight.device_mesh and where_it_lies(weight) is weight
        assert torch.equal(copy.to_local(), weight.to_local())
        assert copy.to_local().data_ptr() != weight.to_local().data_ptr()
