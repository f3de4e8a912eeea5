"""Each process holds a share of every parameter of its block: FSDP2 over the data dimension.

A layer's weights are gathered before it runs and given back after it, and its gradients are
averaged into each process's share as soon as they are there. What belongs to no layer is gathered
for the whole step. Rajbhandari et al. 2020 (arXiv:1910.02054), ZeRO-3.
"""

from torch import nn

from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.parallel.job import Axis

CALLED = ("loss", "conventional_loss")  # what a step calls of a family, and what gathers weights


def shard(blocks: DiffusionBlocks, data: Axis) -> None:
    """Leave of the trained blocks' parameters this process's share, in place; names stay.

    Args:
        blocks:  on the device; or on the host, and each layer goes to the device when it is its
                 turn, so that there is never more than one whole there
        data:    the processes that share a batch
    Raises:
        ValueError: several models would share their layers, which FSDP2 cannot do.
    """
    if data.mesh is None:
        return
    # takes a second to import, which is for those to pay who share parameters out
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    models = {id(model): model for model in map(blocks.of, blocks.trained)}
    if len(models) > 1:
        raise ValueError(
            "with copies, several blocks must not be trained by one process that holds a share of "
            f"each parameter, got {len(blocks.trained)}: train each with processes of its own"
        )
    (model,) = models.values()
    used = {index for block in blocks.trained for index in block.layers}
    idle: set[nn.Parameter] = set()
    for index, layer in enumerate(model.layers):
        if index in used:
            fully_shard(layer, mesh=data.mesh)
        else:
            idle.update(layer.parameters())
    fully_shard(model, mesh=data.mesh, ignored_params=idle)
    for name in CALLED:
        if hasattr(model, name):
            register_fsdp_forward_method(model, name)
