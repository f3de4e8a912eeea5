"""Gives each process of a job what it is to hold of its block, before anything is trained."""

from torch import nn

from dbkernels.models.tensor_parallel import Cut, cut_layer, cuts
from dbkernels.ops.layer.gradients import is_quantized
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.optimizers.kind import Kind
from dbkernels.training.parallel.job import Job
from dbkernels.training.parallel.placement import Placements
from dbkernels.training.parallel.sharding import shard
from dbkernels.training.trainer_config import TrainerConfig

# what a step does that several processes cannot do together, by the setting, and why
TOGETHER = {
    "cuda_graphs": "whose graphs would hold what they send to each other",
    "optimizer_in_backward": "of which each would know the norm of its own gradients alone",
    "compile_stem_and_head": "whose weights are not where compiled code looks for them",
}


def place(blocks: DiffusionBlocks, config: TrainerConfig, job: Job, kind: Kind) -> Placements:
    """Cut layers and share parameters out, in place, as the job and the configuration say.

    Args:
        blocks:  whole, on the device, and the same on all processes
        config:  of the trainer
        job:     this process among those that train the blocks
        kind:    of the optimizer
    Raises:
        ValueError: a setting cannot be had by several processes, or not for these blocks.
    """
    if job.group is None:
        return Placements(job)
    for name, why in TOGETHER.items():
        if getattr(config, name):
            raise ValueError(f"{name} must be off with {job.count} processes, {why}, got on")
    if config.offload != "none":
        raise ValueError(
            f"offload must be none with {job.count} processes, which train one block, got "
            f"{config.offload}"
        )
    if blocks.weighting == "published" and job.data.size > 1:
        raise ValueError(
            f"weighting must not be published with {job.data.size} processes that share a batch, "
            "as it is no mean over samples, got published"
        )
    apart = config.shard or job.tensor.size > 1
    if apart and not kind.by_element:
        raise ValueError(
            "optimizer must be adamw where each process holds a share of a parameter, got "
            f"{kind.name}"
        )
    for name, parameter in blocks.named_parameters():
        if apart and is_quantized(parameter):
            of = type(parameter).__name__
            which = "shard must be off" if config.shard else "tensor_parallel must be 1"
            got = "on" if config.shard else job.tensor.size
            raise ValueError(f"{which} with {name} of {of}, got {got}")
    found: dict[nn.Parameter, Cut] = {}
    if job.tensor.group is not None:
        for index in sorted({index for block in blocks.trained for index in block.layers}):
            layer = blocks.model.layers[index]
            own = cuts(layer)
            cut_layer(layer, job.tensor.group)
            found |= {p: own[name] for name, p in layer.named_parameters() if name in own}
    if config.shard:
        names = {id(p): name for name, p in blocks.named_parameters()}
        before = {names[id(p)]: cut for p, cut in found.items()}
        shard(blocks, job.data)
        # FSDP2 puts parameters of its own in their places
        found = {p: before[name] for name, p in blocks.named_parameters() if name in before}
    return Placements(job, found)
