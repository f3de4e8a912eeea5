"""The configuration of a run: everything that decides its numbers, and the file that keeps it."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from dbkernels.data.augment import drop_conditions, mirror, shift
from dbkernels.data.image_folder import Convert
from dbkernels.data.images import Batch, Data
from dbkernels.data.rand_augment import policy_for, rand_augment
from dbkernels.diffusion.process import NoiseOrder, Process, Scheme
from dbkernels.models.absent import DrawingForAbsent, load, made_without, move
from dbkernels.models.family import FamilyModule, Weighting
from dbkernels.models.registry import ModelConfig, family_named
from dbkernels.models.start import Weights
from dbkernels.ops.philox import Draw
from dbkernels.settings import check_choice, check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks, Sharing
from dbkernels.training.lora_config import NO_LORA, LoraConfig
from dbkernels.training.offload.offloader import check_offload
from dbkernels.training.parallel.job import ALONE, Job
from dbkernels.training.partition import Block, partition
from dbkernels.training.saved import require_types
from dbkernels.training.trainer import Augment, Trainer
from dbkernels.training.trainer import Objective as Loss
from dbkernels.training.trainer_config import TrainerConfig
from dbkernels.whole_file import make_directory, write_whole

Objective = Literal["blocks", "conventional"]
VERSION = 5  # of config.json and of what a checkpoint holds; every earlier one is read


@dataclass(frozen=True)
class PartitionConfig:
    """How the layers and the noise are cut, and what the blocks share."""

    num_blocks: int = 3
    """Number of blocks; 1 trains end to end."""
    layers: str = ""
    """Indices of layers in running order, comma separated; they may repeat. Empty: each once."""
    split: str = ""
    """Layers per block, comma separated, the block of the most noise first; empty: evenly."""
    scheme: Scheme = "equal_probability"
    """How the range of noise is cut into intervals."""
    gamma: float = 0.05
    """Overlap of neighbouring blocks, as a share of each one's width."""
    sharing: Sharing = "joint"
    """joint: every block trains the same stem and head. copies: each block has its own."""
    noise_order: NoiseOrder = "first"
    """Layers that meet the most noise: the first, or the deepest."""

    def of(
        self,
        model: FamilyModule,
        process: Process,
        weighting: Weighting,
        only: int | None = None,
    ) -> DiffusionBlocks:
        """The blocks of a model; `DiffusionBlocks` says the rest."""
        settings = asdict(self) | self._numbers()
        return DiffusionBlocks(model, process=process, weighting=weighting, only=only, **settings)

    def cut(self, depth: int, process: Process) -> tuple[Block, ...]:
        """The blocks of a stack of so many layers; `partition` says the rest."""
        numbers = self._numbers()
        return partition(
            depth if numbers["layers"] is None else numbers["layers"],
            self.num_blocks,
            process,
            split=numbers["split"],
            scheme=self.scheme,
            gamma=self.gamma,
            noise_order=self.noise_order,
        )

    def absent(self, only: int, depth: int, process: Process) -> set[int]:
        """Of so many layers, those that one block does not run; block 0 has what no block runs."""
        check_number("block", only, 0, self.num_blocks - 1)
        blocks = self.cut(depth, process)
        owner = {index: block.index for block in blocks for index in block.layers}
        return {index for index in range(depth) if owner.get(index, 0) != only}

    def _numbers(self) -> dict[str, list[int] | None]:
        return {name: _whole_numbers(name, getattr(self, name)) for name in ("layers", "split")}


def _whole_numbers(name: str, text: str) -> list[int] | None:
    try:
        return [int(number) for number in text.split(",")] if text else None
    except ValueError:
        raise ValueError(f"{name} must be whole numbers with commas between, got {text}") from None


@dataclass(frozen=True)
class StartConfig:
    """The trained network that a run starts from, and whether its blocks learn from it too."""

    source: str = ""
    """A run, its checkpoint, or somebody else's file, as it was named; empty starts anew."""
    digest: str = ""
    """Of its weights."""
    distill: float = 0.0
    """Share of each block's target that is what the whole network predicts: 0 to 1."""

    def __post_init__(self) -> None:
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must be from 0 to 1, got {self.distill}")
        if self.distill and not self.source:
            raise ValueError(
                "distill must be 0 for a run that starts from no trained network, "
                f"got {self.distill}"
            )


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run's numbers."""

    family: str
    """A key of `FAMILIES`."""
    model: ModelConfig
    data: str
    """See `open_data`."""
    weighting: Weighting
    """Weight of the noise levels in the loss."""
    label_drop: float
    """Share of labels or texts dropped for guidance; families without an empty one need 0."""
    mirror: bool
    """Whether images are mirrored at random."""
    shift: int
    """Pixels by which images are moved at random, at most."""
    partition: PartitionConfig
    prior: Process
    """The noise, of the family's own kind."""
    trainer: TrainerConfig
    convert: Convert = "none"
    """Channels of the images of a folder, as `open_data` has it."""
    objective: Objective = "blocks"
    """blocks: each denoises. conventional: the network as it is trained without noise, whole."""
    stride: int = 0
    """Tokens from one window of text to the next in training, as `open_tokens` has it. No setting
    of the model, which is the same however its text is cut, nor of an evaluation."""
    start: StartConfig = StartConfig()
    """The trained network that it starts from."""
    lora: LoraConfig = NO_LORA
    """Adapters, which alone are trained then."""
    rand_augment: bool = False
    """Whether torchvision's RandAugment changes images, after they are moved and mirrored."""

    def __post_init__(self) -> None:
        check_choice("convert", self.convert, get_args(Convert))
        check_choice("objective", self.objective, get_args(Objective))
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
        check_number("shift", self.shift, 0)
        check_number("stride", self.stride, 0)
        if self.weighting == "published" and self.trainer.accumulate > 1:
            raise ValueError(
                "accumulate must be 1 with the published weighting, which is no mean over samples, "
                f"got {self.trainer.accumulate}"
            )
        if self.start.distill and self.trainer.shard:
            raise ValueError(
                "shard must be off with distill, whose teacher every process holds whole, got on"
            )
        self._check_family()

    def _check_family(self) -> None:
        """Whether the family can do what is asked of it."""
        entry, blocks = family_named(self.family), self.partition.num_blocks
        if self.label_drop and not entry.guided:
            raise ValueError(f"label_drop must be 0 for {self.family}, got {self.label_drop}")
        if "image" not in self.model.fields():
            for name in ("mirror", "shift", "rand_augment"):
                if value := getattr(self, name):
                    raise ValueError(
                        f"{name} must be {type(value)()} for {self.family}, got {value}"
                    )
        if self.rand_augment and self.trainer.cuda_graphs:
            raise ValueError(
                "cuda_graphs must be off with rand_augment, which the host draws, got on"
            )
        if self.objective == "conventional" and not entry.conventional:
            raise ValueError(
                f"objective must be blocks for {self.family}, which is trained end to end with one "
                "block, got conventional"
            )
        if self.objective == "conventional" and blocks != 1:
            raise ValueError(f"num_blocks must be 1 for the conventional objective, got {blocks}")
        if self.objective == "conventional" and entry.recurs and self.trainer.cuda_graphs:
            raise ValueError(
                f"cuda_graphs must be off for the conventional objective of {self.family}, whose "
                "steps differ in how often layers run, got on"
            )
        if self.objective == "conventional" and self.start.distill:
            raise ValueError(
                "distill must be 0 for the conventional objective, which has no levels of noise, "
                f"got {self.start.distill}"
            )
        own = type(entry.process_of(self.model))
        if type(self.prior) is not own:
            raise ValueError(f"prior must be {own.__name__} for this model, got {self.prior}")
        check_offload(self.trainer.offload, self.model.independent, blocks)

    def model_of(self, weights: Weights | None = None, only: int | None = None) -> FamilyModule:
        """A new model, initialised from the run's seed, or with all of some weights.

        Args:
            weights:  by name
            only:     index of the one block whose layers it has in memory; None has all
        """
        family: FamilyModule = family_named(self.family).model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.trainer.seed)
            if only is None:
                model = family(self.model)
            else:
                absent = partial(self.partition.absent, only, process=self.prior)
                model = made_without(partial(family, self.model), absent)
        if weights is not None:
            load(model, weights)
        return model

    def build(
        self,
        device: torch.device | str,
        weights: Weights | None = None,
        only: int | None = None,
    ) -> DiffusionBlocks:
        """New blocks on a device, of what `model_of` gives."""
        model = self.model_of(weights, only)
        if self.start.distill:
            # a teacher and its blocks must agree on what z means
            for name in model.target_parts:
                getattr(model, name).requires_grad_(False)
        with nullcontext() if only is None else DrawingForAbsent():
            self.lora.add_to(model, self.trainer.seed)
        blocks = self.partition.of(model, self.prior, self.weighting, only)
        # fake tensors cannot be moved, not even to where they are
        if blocks.device == torch.device(device):
            return blocks
        if only is None:
            return blocks.to(device)
        move(blocks, device)
        return blocks

    def home(self, device: torch.device | str, job: Job = ALONE) -> torch.device | str:
        """Where models are built that train on a device: where all that is built has room."""
        apart = self.trainer.offload != "none" or job.shares_out(self.trainer.shard)
        return "cpu" if apart else device

    def trainer_on(
        self,
        device: torch.device | str,
        data: Data,
        weights: Weights | None = None,
        loss: Loss | None = None,
        *,
        workers: int = 0,
        job: Job = ALONE,
    ) -> Trainer:
        """A trainer at its first step, of blocks with these weights; with another loss, if any."""
        blocks = self.build(self.home(device, job), weights, job.block)
        return self.trainer_of(blocks, data, device=device, loss=loss, workers=workers, job=job)

    def trainer_of(
        self,
        blocks: DiffusionBlocks,
        data: Data,
        *,
        device: torch.device | str | None = None,
        loss: Loss | None = None,
        workers: int = 0,
        job: Job = ALONE,
    ) -> Trainer:
        """A trainer at its first step, of blocks that `build` gave; `Trainer` says the rest."""
        settings = asdict(self.trainer) | {"augment": self._augment(blocks, data), "device": device}
        settings |= {"objective": loss, "workers": workers, "job": job}
        if self.objective == "conventional":
            settings["objective"] = DiffusionBlocks.conventional_loss
        return Trainer(blocks, data, **settings)

    def _augment(self, blocks: DiffusionBlocks, data: Data) -> Augment | None:
        changes: list[Augment] = [partial(shift, pixels=self.shift)] if self.shift else []
        changes += [mirror] if self.mirror else []
        changes += [partial(rand_augment, policy=policy_for(data))] if self.rand_augment else []
        if self.label_drop:
            drop = partial(drop_conditions, share=self.label_drop)
            changes.append(partial(drop, unconditional=blocks.model.unconditional))

        def augment(batch: Batch, draw: Draw) -> Batch:
            for change in changes:
                batch = change(batch, draw)
            return batch

        return augment if changes else None


def write_config(config: RunConfig, directory: Path) -> None:
    """Write config.json, whole or not at all."""
    make_directory(directory)
    text = json.dumps({"version": VERSION, **asdict(config)}, indent=2)
    write_whole(directory / "config.json", f"{text}\n")


def read_config(directory: Path) -> RunConfig:
    """The configuration of a run.

    Raises:
        ValueError: the directory holds no run, or one of another version.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"a run's directory must hold config.json, got none in {directory}")
    try:
        saved = dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} must be the JSON of a run, got {error}") from None
    return config_of(saved, saved.pop("version", None), path)


def config_of(saved: dict[str, Any], version: object, path: Path) -> RunConfig:
    """The configuration in a file of any version that there was."""
    if not isinstance(version, int) or version not in range(1, VERSION + 1):
        raise ValueError(f"{path} must have a version from 1 to {VERSION}, got {version}")
    try:
        if version == 1:
            # what blocks share was a setting of the trainer
            trainer = dict(saved["trainer"])
            partition = {**saved["partition"], "sharing": trainer.pop("sharing")}
            saved = {**saved, "trainer": trainer, "partition": partition}
        if version < 4 and saved["weighting"] == "edm":
            # the one weight that a process had
            saved = {**saved, "weighting": "process"}
        if version < 5:
            # weight decay was on everything
            saved = {**saved, "trainer": {**saved["trainer"], "decay_on": "all"}}
        entry = family_named(saved["family"])
        model = entry.config.stored(saved["model"], version)
        saved = {**saved, "model": model}
        nested: dict[str, Callable[..., object]] = {
            "partition": PartitionConfig,
            "prior": type(entry.process_of(model)),
            "trainer": TrainerConfig,
            "start": StartConfig,
            "lora": LoraConfig,
        }
        settings: dict[str, Any] = {
            k: nested[k](**v) if k in nested else v for k, v in saved.items()
        }
        config = RunConfig(**settings)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} must hold the configuration of a run, got {error}") from None
    try:
        require_types(config)
    except ValueError as error:
        raise ValueError(f"{path} must hold the configuration of a run: {error}") from None
    return config
