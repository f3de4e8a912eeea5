"""The network that a run starts from: its weights, and for distillation a teacher.

Where blocks learn from the whole network, the run keeps its weights, and asks for nothing else when
it is resumed.

<run>/trained/step-00000000   a checkpoint: what blocks start from
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from dbkernels.data.images import Batch
from dbkernels.models.family import FamilyModule
from dbkernels.models.registry import family_named
from dbkernels.models.start import Trained, take_over
from dbkernels.ops.philox import Draw
from dbkernels.training import checkpoint
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.partition import Block
from dbkernels.training.run_config import RunConfig, config_of, read_config

KEPT = "trained"
PREFIX = "model."  # of the names of a model's parameters in its blocks


def trained_run(path: Path) -> Trained:
    """The network that a run trained end to end, with the average of its weights if it kept one.

    Args:
        path:  of the run, whose newest checkpoint counts, or of one of its checkpoints
    Raises:
        ValueError: there is none, it is damaged, or it is of several blocks.
    """
    if (path / checkpoint.STATE_FILE).is_file():
        tensors, state = checkpoint.load(path)
    else:
        read_config(path)
        path, tensors, state = checkpoint.load_latest(path / "checkpoints")
    if not isinstance(state.get("config"), dict):
        raise ValueError(f"{path} must be the checkpoint of a run, got one without config")
    config = config_of(state["config"], state.get("version"), path)
    if (blocks := config.partition.num_blocks) != 1:
        raise ValueError(
            f"{path} must hold a network that was trained end to end, in one block, got {blocks}"
        )
    weights = tensors.get("model", {}) | tensors.get("ema", {})
    own = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    without_noise = config.objective == "conventional"
    return Trained(str(path), config.family, config.model, own, without_noise)


def start_weights(config: RunConfig, trained: Trained | None) -> dict[str, Tensor] | None:
    """What the blocks of a new run start from; None where that is their own initialisation.

    Raises:
        ValueError: the configuration names another network, or one that it cannot start from.
    """
    if trained is None and not config.start.source:
        return None
    digest = None if trained is None else trained.digest
    if digest != config.start.digest:
        raise ValueError(
            f"trained must be the network {config.start.digest or None} that the configuration "
            f"names, got {digest}"
        )
    assert trained is not None  # it has the digest
    if trained.family != config.family:
        raise ValueError(
            f"family must be {trained.family} as in {trained.where}, got {config.family}"
        )
    model, without_noise = config.model_of(), config.objective == "conventional"
    take_over(model, trained, family_named(config.family).start, without_noise=without_noise)
    return model.state_dict()


def keep(directory: Path, weights: dict[str, Tensor], digest: str) -> None:
    """Keep in a run's directory what its blocks start from."""
    checkpoint.save(directory / KEPT, 0, {"model": weights}, {"digest": digest})


def kept(directory: Path, digest: str) -> dict[str, Tensor]:
    """What `keep` wrote.

    Raises:
        ValueError: it is missing or damaged, or of another network.
    """
    path, tensors, state = checkpoint.load_latest(directory / KEPT)
    if state.get("digest") != digest:
        raise ValueError(f"{path} must be of the network {digest}, got {state.get('digest')}")
    return tensors["model"]


class Distillation:
    """An objective whose target is, in part, what the whole network predicts of the same z.

    The teacher's forward is that of the whole network, without what a backward would need.

    Args:
        teacher:  a model as the blocks started, frozen
        share:    of the target, from 0 to 1
    """

    def __init__(self, teacher: FamilyModule, share: float):
        self.teacher, self.share = teacher, share

    def __call__(self, blocks: DiffusionBlocks, block: Block, batch: Batch, draw: Draw) -> Tensor:
        return blocks.taught_loss(block, batch, draw, self._predict, self.share)

    @torch.no_grad()
    def _predict(self, z: Tensor, level: Tensor, batch: Batch) -> Tensor:
        return self.teacher.denoise(z, level, range(len(self.teacher.layers)), batch)


def distillation(
    config: RunConfig, weights: dict[str, Tensor], device: torch.device | str
) -> Distillation:
    """The objective of a run; where its blocks are offloaded, so is the teacher, layer by layer."""
    model = config.model_of(weights).eval().requires_grad_(False)
    if config.trainer.offload == "none":
        return Distillation(model.to(device), config.start.distill)
    for child in model.children():
        if child is not model.layers:
            child.to(device)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.to(device)
    for layer in model.layers:
        one_at_a_time(layer, partial(Tensor.to, device=device))
    return Distillation(model, config.start.distill)


def one_at_a_time(layer: nn.Module, bring: Callable[[Tensor], Tensor]) -> None:
    """Have what `bring` gives of a frozen layer's weights while it runs, and these otherwise."""
    host = {p: p.data for p in layer.parameters()}

    def enter(*_: object) -> None:
        for parameter in host:
            parameter.data = bring(host[parameter])

    def leave(*_: object) -> None:
        for parameter in host:
            parameter.data = host[parameter]

    layer.register_forward_pre_hook(enter)
    layer.register_forward_hook(leave, always_call=True)
