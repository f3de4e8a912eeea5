"""Layers and models that two ranks share, alone and beside two halves of a batch."""

import os
from contextlib import contextmanager

import torch
import torch.distributed as dist
from models.shared_layers import CASES, EVERY_POLICY, MODELS, B, blocks_of, model_results
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dbkernels.models.tensor_parallel import cut_layer
from dbkernels.ops.layer import mlp, passes
from dbkernels.ops.layer.gradients import Gradients
from dbkernels.ops.layer.ranks import Ranks

HALVES = 2  # of a batch
SIZE = 2  # ranks that share a layer
OFTEN = ("norms", "num_queries", "dropout", "condition of tokens", "parallel", "cross", "joint")
IN_PARTS = [(case, recompute) for case in OFTEN for recompute in ("none", "mlp", "layer")]
SHARDED = ("gelu", "norms", "joint")


def nothing(*args):
    return None


def begin_nothing(ranks, t):
    return dist.all_reduce(t.clone(), group=ranks.group, async_op=True)


# what is left out, and of what
LEFT_OUT = {
    "sum": (Ranks, "sum", nothing),
    "begin_sum": (Ranks, "begin_sum", begin_nothing),
    "add_up": (Gradients, "add_up", nothing),
}


@contextmanager
def patched(*changes):
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def shared(case, group, recompute="none", dtype=torch.float64):
    layer = CASES[case].layer(recompute, dtype)
    cut_layer(layer, group)
    return layer


def of_layers(group):
    found = {}
    for case in CASES:
        for recompute in EVERY_POLICY:
            results = CASES[case].results(shared(case, group, recompute))
            found[f"whole batch/{case}/{recompute}"] = results
    # several chunks of the MLP, and several parts of the samples
    with patched((mlp, "CHUNK", 5), (passes, "PART", 8)):
        for case, recompute in IN_PARTS:
            results = CASES[case].results(shared(case, group, recompute))
            found[f"in parts/{case}/{recompute}"] = results
    for recompute in EVERY_POLICY:
        with torch.autocast("cpu", torch.bfloat16):
            layer, given = shared("norms", group, recompute, torch.float32), CASES["norms"].inputs()
            given = {name: t.float() for name, t in given.items()}
            found[f"autocast/norms/{recompute}"] = CASES["norms"].results(layer, given)
    for what, change in LEFT_OUT.items():
        with patched(change):
            found[f"without {what}/norms/none"] = CASES["norms"].results(shared("norms", group))
    return found


def of_models(group):
    found = {}
    for family in MODELS:
        blocks = blocks_of(family)
        for layer in blocks.model.layers:
            cut_layer(layer, group)
        found[f"model/{family}/none"] = model_results(blocks)
    return found


def of_sharded(mesh):
    """What FSDP2 makes of a shared layer, from this process's half of the batch."""
    half, found = mesh.get_local_rank("data"), {}
    for case in SHARDED:
        for recompute in ("none", "layer"):
            layer = fully_shard(shared(case, mesh.get_group("ranks"), recompute), mesh=mesh["data"])
            given = {name: t.chunk(HALVES)[half] for name, t in CASES[case].inputs().items()}
            results = CASES[case].results(layer, given)
            found[f"sharded/{case}/{recompute}"] = {
                name: t.full_tensor() if hasattr(t, "full_tensor") else t
                for name, t in results.items()
            }
    return found


def work(process, rendezvous, results):
    torch.set_num_threads(1)
    world = HALVES * SIZE
    dist.init_process_group("gloo", init_method=rendezvous, rank=process, world_size=world)
    mesh = init_device_mesh("cpu", (HALVES, SIZE), mesh_dim_names=("data", "ranks"))
    group, rank = mesh.get_group("ranks"), mesh.get_local_rank("ranks")
    assert B % HALVES == 0
    found = of_sharded(mesh)
    if mesh.get_local_rank("data") == 0:
        found |= of_layers(group) | of_models(group)
        flat = {
            f"{way}/{name}": t.contiguous()
            for way, each in found.items()
            for name, t in each.items()
        }
        save_file(flat, f"{results}{rank}")
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)
