"""One layer trained on a batch by one process, and on its halves by two."""

import os
from functools import partial

import torch
import torch.distributed as dist
from models.tiny import randomise
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from dbkernels.models.layer import AdaLNLayer, LayerConfig

CONFIG = LayerConfig(dim=24, num_heads=3, mlp_hidden=40, cond_dim=7, qk_norm=True)
WORLD = 2


def make_layer(recompute):
    torch.manual_seed(0)
    config = LayerConfig(**{**vars(CONFIG), "recompute": recompute})
    return randomise(AdaLNLayer(config)).double()


def gradients(layer, inputs, *, steps=1):
    """The output, and the gradients of a loss that is a sum over samples, by parameter."""
    for _ in range(steps):
        layer.zero_grad()
        y = layer(*inputs)
        y.square().sum().backward()
    grads = {name.removeprefix("module."): p.grad for name, p in layer.named_parameters()}
    return {"out": y.detach(), **grads}


def sharded(layer, **options):
    # the layer alone: its projections are read, never called
    return fully_shard(layer, mesh=init_device_mesh("cpu", (WORLD,)), **options)


def work(rank, rendezvous, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=WORLD)
    generator = torch.Generator().manual_seed(1)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    whole = draw(4, 5, 24) + 2, draw(4, 7)
    half = [t.chunk(WORLD)[rank] for t in whole]
    ways = {
        "alone": lambda recompute: gradients(make_layer(recompute), whole),
        "ddp": lambda recompute: gradients(DistributedDataParallel(make_layer(recompute)), half),
        "fsdp": lambda recompute: gradients(sharded(make_layer(recompute)), half, steps=2),
        "fsdp bfloat16": lambda recompute: gradients(
            sharded(make_layer(recompute), mp_policy=MixedPrecisionPolicy(torch.bfloat16)), half
        ),
    }
    found = {}
    for way, run in ways.items():
        for recompute in ("none", "layer"):
            for name, t in run(recompute).items():
                full = t.full_tensor() if hasattr(t, "full_tensor") else t
                found[f"{way}/{recompute}/{name}"] = full.contiguous()
    if rank == 0:
        save_file(found, results)
    dist.barrier()
    # an interpreter that ends may find threads of the process group at work, and abort
    os._exit(0)
