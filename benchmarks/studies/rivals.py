"""A baseline as an arm of a study: trained by the library's own trainer, resumed, and measured."""

import time
import warnings
from functools import partial
from pathlib import Path

import torch
from baselines import BASELINES, Baseline, CNNConfig
from baselines.cnn import CNN
from show import Row
from torch import nn

from dbkernels import Trainer, measure_peak
from dbkernels.data.images import Data
from dbkernels.data.spaced import Spaced
from dbkernels.metrics import calibration_error
from dbkernels.models.layer import AdaLNLayer
from dbkernels.models.vit import ViTConfig
from dbkernels.training import checkpoint
from dbkernels.training.evaluation import batches
from dbkernels.training.run_config import RunConfig
from dbkernels.training.run_steps import Saving, take_steps
from studies.arm import Arm

OF_STEPS = ("noprop-ct", "noprop-fm")  # an answer takes many
TIMED = 7  # sweeps, of which the least time counts: others may have kept the machine busy


def train_rival(
    arm: Arm,
    config: RunConfig,
    directory: Path,
    device: torch.device,
    save_every: int,
    *,
    digest: str,
) -> "Rival":
    """Train a baseline to the end, from its last checkpoint where there is one.

    Args:
        arm:         has the baseline
        config:      its trainer's settings, its data, and the sizes of a transformer
        directory:   of its checkpoints
        device:      to train on
        save_every:  steps
        digest:      of the data
    Raises:
        ValueError: the checkpoint is one of other data or of another baseline.
    """
    network, name = arm.baseline
    data = config.model.open(config.data, "train", convert=config.convert)
    sizes = config.model if network == "vit" else CNNConfig()
    assert isinstance(sizes, ViTConfig | CNNConfig)
    kind, few = BASELINES[network, name], {}
    if name in OF_STEPS or arm.baseline == ("cnn", "diffusion blocks"):
        few = {"steps": arm.steps}
    baseline = kind(data, config.trainer.seed, sizes, **few)
    trainer = config.trainer_of(baseline.blocks.to(device), data, loss=baseline.objective)
    root, about = directory / "checkpoints", {"baseline": list(arm.baseline), "data": digest}
    if checkpoint.latest(root) is not None:
        path, tensors, state = checkpoint.load_latest(root)
        if {name: state.get(name) for name in about} != about:
            raise ValueError(f"{path} must be of {arm.name} and of these data, got another")
        trainer.restore(tensors, state["counters"])
    saving = Saving(trainer, root, about, 1, is_async=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        take_steps(trainer, saving, save_every, lambda row: None)
    return Rival(baseline, trainer)


class Rival:
    """A trained baseline and its trainer."""

    def __init__(self, baseline: Baseline, trainer: Trainer):
        self.baseline, self.trainer = baseline, trainer

    @property
    def layers(self) -> list[int]:
        """Of each block: layers of a transformer, or nets of a CNN. A head alone has none."""
        parts = self.baseline.model.layers
        return [
            sum(_is_layer(each) for index in block.layers for each in parts[index].modules())
            for block in self.trainer.blocks
        ]

    def figures(self, data: Data, most: int) -> Row:
        """How well it answers on at most so many images, and what a step of it costs."""
        some = Spaced(data, min(most, len(data)))
        answers, labels = [], []
        for batch, draw in batches(some, 256, self.baseline.blocks.device):
            answers.append(self.baseline.answer(batch, draw))
            labels.append(batch["label"])
        shares, label = torch.cat(answers), torch.cat(labels)
        return {
            "accuracy": [float((shares.argmax(-1) == label).float().mean())],
            "calibration_error": [calibration_error(shares, label)],
            "forwards": self.baseline.forwards,
            "again": self.baseline.again,
            **self._cost(),
        }

    def _cost(self) -> Row:
        """Peak of the costliest block's step, and the time of a step of every block."""
        self.baseline.blocks.train()
        trainer = self.trainer
        optimizers = [each for group in trainer.groups.values() for each in group.optimizers]
        steps = [partial(trainer.step_block, block) for block in trainer.blocks]
        about = {"model": trainer.blocks, "optimizers": optimizers}
        peaks = [measure_peak(step, **about).total_bytes for step in steps]
        least = [min(_timed(step) for _ in range(TIMED)) for step in steps]
        return {"peak_bytes": max(peaks), "sweep_ms": sum(least)}


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, AdaLNLayer | CNN)


def _timed(step: partial) -> float:
    begin = time.perf_counter()
    step()
    return 1e3 * (time.perf_counter() - begin)
