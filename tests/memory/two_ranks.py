"""A stack of layers that FSDP2 shards: its steps on real ranks, and what their allocators say."""

import json
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch._C._profiler import _EventType
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_iter

from dbkernels.models.layer import AdaLNLayer, LayerConfig, run_layers
from dbkernels.ops.backend.register import registered

WORLD, DEPTH, D, B, T, WIDTH = 2, 4, 128, 8, 128, 49
BFLOAT16 = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
CASES = {
    "none": {},
    "qkv": {"recompute": "qkv"},
    "layer": {"recompute": "layer"},
    "none, gathered": {"reshard_after_forward": False},
    "layer, gathered": {"recompute": "layer", "reshard_after_forward": False},
    "none, autocast": {"autocast": True},
    "layer, autocast, ends": {"recompute": "layer", "autocast": True, "ends": True},
    "qkv, ends": {"recompute": "qkv", "ends": True},
    "none, gathered, ends": {"reshard_after_forward": False, "ends": True},
    "qkv, bfloat16, ends": {"recompute": "qkv", "mp_policy": BFLOAT16, "ends": True},
    "layer, cut batch": {"recompute": "layer", "parts": 2},
}


class Layers(nn.Module):
    """A loss of layers, and of a stem and a head which are the root's."""

    def __init__(self, recompute, ends):
        super().__init__()
        config = LayerConfig(dim=D, num_heads=4, mlp_hidden=4 * D, cond_dim=D, recompute=recompute)
        self.layers = nn.ModuleList(AdaLNLayer(config) for _ in range(DEPTH))
        self.stem = nn.Linear(WIDTH, D) if ends else nn.Identity()
        self.head = nn.Linear(D, WIDTH) if ends else nn.Identity()

    def forward(self, x, c):
        y = self.head(run_layers(list(self.layers), self.stem(x), c))
        return y.float().square().mean()


def sharded(mesh, *, recompute="none", ends=False, autocast=False, parts=1, **options):
    """A step, and whose tensors are its; without a mesh nothing is sharded."""
    model = Layers(recompute, ends)
    for module in (*model.layers, model) if mesh else ():
        fully_shard(module, mesh=mesh, **options)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x, c = torch.randn(B, T, WIDTH if ends else D), torch.randn(B, D)

    def step():
        for part in zip(x.chunk(parts), c.chunk(parts), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = model(*part)
            loss.backward()
            del loss
        optimizer.step()
        optimizer.zero_grad()

    return step, {"model": model, "optimizers": [optimizer], "inputs": [x, c]}


def resident_bytes(model, optimizers, inputs):
    """What is there between two steps."""
    states = [tensor for o in optimizers for s in o.state.values() for tensor in s.values()]
    tensors = (*model.parameters(), *states, *inputs)
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors]
    return sum(tensor.untyped_storage().nbytes() for tensor in local)


def holders(tensor):
    """How many hold a tensor, and its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)


class Done:
    """Of a collective that is over."""

    def wait(self):
        pass


def settled(collective):
    """A collective after which gloo's thread has let go of the tensors, as a stream would have."""

    def run(*given, async_op=False, **named):
        told = tree_iter((given, named))
        tensors = [tensor for tensor in told if isinstance(tensor, torch.Tensor)]
        before = list(map(holders, tensors))
        collective(*given, **named)
        while list(map(holders, tensors)) != before:
            time.sleep(1e-4)
        return Done() if async_op else None

    return run


def allocator_peak(step):
    """Highest growth over the start by the CPU allocator's events, without what is a CPU's alone.

    gloo copies what it sends, inside of a collective or in a thread of its own, where NCCL sends
    the tensors. Matmuls of bfloat16 copy their operands, and free the copies again.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        step()
    tree = trace.profiler.kineto_results.experimental_event_tree()
    thread, events = tree[0].start_tid, []
    while tree:
        events.append(tree.pop())
        tree += events[-1].children
    now, peak, left_out = 0, 0, {}
    for event in sorted(events, key=lambda event: event.start_time_ns):
        if event.tag != _EventType.Allocation:
            continue
        size, address = event.extra_fields.alloc_size, event.extra_fields.ptr
        left_out |= {address: event.start_tid != thread or is_copied(event)} if size > 0 else {}
        now += 0 if left_out.get(address) else size
        peak = max(peak, now)
    # a step may leave its loss, and let go of the one before, which is not in the profile
    assert now <= 8, f"{now} bytes of a step are left"
    return peak


def is_copied(allocation):
    """Whether a collective allocates it, or a matmul that frees it again."""
    above = allocation.parent
    if above is not None and above.name in ("aten::mm", "aten::addmm"):
        later = [e for e in above.children if e.start_time_ns > allocation.start_time_ns]
        frees = [e.extra_fields for e in later if e.tag == _EventType.Allocation]
        return allocation.extra_fields.ptr in [e.ptr for e in frees if e.alloc_size < 0]
    while above is not None and not above.name.startswith("c10d::"):
        above = above.parent
    return above is not None


def meet(rank, rendezvous):
    """Be one of two ranks, whose ops of this package write nothing and allocate nothing."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    for name in ("all_gather", "all_gather_single", "reduce_scatter_single", "all_reduce"):
        setattr(dist, name, settled(getattr(dist, name)))
    library = torch.library.Library("dbkernels", "IMPL")
    for name in registered():
        library.impl(name, lambda *_: None, "CPU")
    return library


def part():
    """End with the other rank."""
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)


def work(rank, rendezvous, results):
    library = meet(rank, rendezvous)
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name, case in CASES.items():
        step, owners = sharded(mesh, **case)
        step()
        found[name] = resident_bytes(**owners) + allocator_peak(step)
    Path(results, f"{rank}.json").write_text(json.dumps(found))
    library._destroy()
    part()
