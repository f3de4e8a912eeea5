"""Whether a training run has room on this machine, said before anything runs.

    require_fits("vit", "--preset published --batch-size 128 --num-blocks 3", torch.device("cuda"))

The flags are those of `dbkernels train`. A step of its costliest block is followed on tensors that
hold nothing, so the data need not be there: what they say of a model is the preset's or is given.
"""

from dataclasses import fields

import torch
import tyro

from dbkernels.cli.train import Train
from dbkernels.memory.allocator import Target, target_of
from dbkernels.memory.units import in_words
from dbkernels.models.registry import ModelConfig, family_named
from dbkernels.planning.dry_run import predicted
from dbkernels.planning.recipe import Recipe
from dbkernels.planning.search import context_bytes
from dbkernels.training.lora_config import LoraConfig
from dbkernels.training.trainer_config import TrainerConfig

PROCESS = 2**29  # bytes of Python and torch in host memory, beside a run's tensors
SIZES = "patch", "dim", "depth", "num_heads", "length"


class Conventional(Recipe):
    """A recipe of the network without noise, of the fused layer that blocks have too."""

    objective = "conventional"


def recipe_of(family: str, flags: str, target: Target, of_data: dict[str, int]) -> Recipe:
    """The way to train that flags of `dbkernels train` describe.

    Args:
        family:   a key of `FAMILIES`
        flags:    but for --out and --data, which may be left out
        target:   the device that trains
        of_data:  sizes of the model that data would say, such as image_size, by field
    Raises:
        ValueError: a flag has a value that it cannot have, or there is no such family.
        SystemExit: there is no such flag.
    """
    entry = family_named(family)
    given = tyro.cli(
        Train,
        args=[family, "--out", "none", *flags.split()],
        config=(tyro.conf.OmitArgPrefixes,),
    )
    partition = given.partition.for_family(entry, given.objective)
    layers, split = (
        tuple(map(int, text.split(","))) if text else None
        for text in (partition.layers, partition.split)
    )
    names = {field.name for field in fields(Recipe)} & {f.name for f in fields(TrainerConfig)}
    same = {name: getattr(given.trainer, name) for name in names}
    # files need of the device what host memory does
    same["offload"] = "none" if same["offload"] == "none" else "cpu"
    recipe = Recipe if given.objective == "blocks" else Conventional
    return recipe(
        family=family,
        preset=given.preset or entry.model.smallest,
        model=_model(given, of_data),
        num_blocks=partition.num_blocks,
        layers=layers,
        split=split,
        sharing=partition.sharing,
        recompute=given.recompute,
        lora=LoraConfig(given.lora, given.lora_alpha, given.lora_targets, given.lora_base),
        device=target,
        **same,
    )


def _model(given: Train, of_data: dict[str, int]) -> ModelConfig:
    preset = family_named(given.family).model.preset(given.preset)
    sizes = {name: getattr(given, name) for name in SIZES if getattr(given, name)}
    return given.noise.of(given.text.of(preset.resized(sizes | of_data)))


def needed_bytes(
    family: str, flags: str, target: Target, *, of_data: dict[str, int] | None = None
) -> int:
    """Bytes that a run takes of its device at its peak, with those that no tensor has.

    Arguments and errors are those of `recipe_of`.
    """
    (found,) = predicted([recipe_of(family, flags, target, of_data or {})])
    return found.peak_reserved_bytes + (context_bytes(target) if target.is_gpu else PROCESS)


def free_bytes(device: torch.device) -> int:
    """Bytes of a device of this machine that nobody uses."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with open("/proc/meminfo") as file:
        sizes = dict(line.split(":") for line in file)
    return 2**10 * int(sizes["MemAvailable"].split()[0])


def require_fits(
    family: str, flags: str, device: torch.device, *, of_data: dict[str, int] | None = None
) -> int:
    """What `needed_bytes` gives for a device of this machine, where it has as much.

    Raises:
        ValueError: it has less, or as `recipe_of`.
    """
    needed = needed_bytes(family, flags, target_of(device), of_data=of_data)
    if needed > (free := free_bytes(device)):
        raise ValueError(
            f"{device} must have {in_words(needed)} free to train {family} {flags}, "
            f"got {in_words(free)}"
        )
    return needed
