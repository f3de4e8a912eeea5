"""One way to train one model: what profile, plan, budgets, benchmarks and a dry run describe."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dbkernels.data.made_up import MadeUpData
from dbkernels.memory.allocator import TARGETS, Target, target_named
from dbkernels.models.baseline import Baseline, use_baseline
from dbkernels.models.registry import ModelConfig, family_named
from dbkernels.ops.layer.recompute import POLICIES, Recompute
from dbkernels.settings import check_number
from dbkernels.training.diffusion_blocks import Sharing
from dbkernels.training.lora_config import NO_LORA, LoraConfig
from dbkernels.training.optimizers.registry import OptimizerName
from dbkernels.training.parallel.job import ALONE, Job
from dbkernels.training.partition import partition
from dbkernels.training.run_config import Objective, PartitionConfig, RunConfig
from dbkernels.training.trainer import Trainer
from dbkernels.training.trainer_config import Offload, TrainerConfig

BASELINES: dict[str, Baseline | None] = {  # what runs the layers; None is the fused layer
    "end_to_end": "stock",
    "checkpointed": "checkpointed",
    "selective": "selective",
    "compiled": "compiled",
    "block_stock": "stock",
    "block_fused": None,
}
METHODS = tuple(BASELINES)
BLOCKWISE = ("block_stock", "block_fused")
OFFLOAD: tuple[Offload, ...] = ("none", "cpu")  # disk needs of the device what cpu does
STEPS = 10**6  # of a run that nobody ends
Settings = dict[str, str | int | bool | None]
SETTINGS = {  # of a recipe in a row, and what each may be
    "family": str,
    "preset": str,
    "batch": int,
    "autocast": bool,
    "optimizer_in_backward": bool,
    "target": str,
    "method": str,
    "num_blocks": int,
    "recompute": str | None,
    "offload": str,
}
OTHERS: dict[str, type] = {  # only where they are not the default
    "optimizer": str,
    "offload_activations": bool,
    "data_parallel": int,
    "tensor_parallel": int,
    "shard": bool,
    "alone": bool,
}


@dataclass(frozen=True)
class Recipe:
    """A model, how it is trained, and the device that trains it.

    Raises:
        ValueError: settings contradict each other, or no block could be made of the model.
    """

    family: str
    preset: str
    """Name of the sizes of the model in a row; empty where they have no name."""
    model: ModelConfig
    """The recipe's recompute takes the place of its own."""
    batch_size: int = 128
    """Samples of a step, which are made up; of all devices that share it."""
    accumulate: int = 1
    """Parts that a batch is cut into."""
    method: str = "block_fused"
    """What runs the layers: all but block_fused run plain torch."""
    num_blocks: int = 1
    """1 trains all layers in every step."""
    layers: tuple[int, ...] | None = None
    """Indices of layers in running order, the first for the most noise; None runs each once."""
    split: tuple[int, ...] | None = None
    """Layers per block, the noisiest block first; None splits evenly."""
    recompute: Recompute | None = "none"
    """Of the fused layer; None for plain torch."""
    budget: float | None = None
    """Share of its activations that compiled may keep, from 0 to 1; None for the other methods."""
    offload: Offload = "none"
    prefetch: bool = False
    offload_activations: bool = False
    sharing: Sharing = "joint"
    """A block that has a job of its own has a stem and a head of its own in any case."""
    ema: float = 0.0
    optimizer: OptimizerName = "adamw"
    optimizer_in_backward: bool = False
    """Without clipping, whose norm would be known too late."""
    autocast: bool = False
    """Compute in bfloat16; parameters stay float32."""
    cuda_graphs: bool = False
    compile_stem_and_head: bool = False
    lora: LoraConfig = NO_LORA
    """Adapters, which alone are trained then."""
    data_parallel: int = 1
    """Devices that share a batch; those of one block, where there are several."""
    tensor_parallel: int = 1
    """Devices that share each layer, for each share of a batch."""
    shard: bool = False
    """Whether each device holds a share of every parameter, by FSDP2."""
    alone: bool = False
    """Whether each block has a job of its own, as with several devices it has in any case."""
    device: Target = TARGETS["h100"]
    """That trains, or that is predicted."""

    def __post_init__(self) -> None:
        _require("method", self.method, METHODS)
        _require("offload", self.offload, OFFLOAD)
        policies = tuple(POLICIES) if self.method == "block_fused" else (None,)
        _require(f"recompute of {self.method}", self.recompute, policies)
        if self.budget is not None and self.method != "compiled":
            raise ValueError(f"budget must be None for {self.method}, got {self.budget}")
        if self.budget is not None and not 0 <= self.budget <= 1:
            raise ValueError(f"budget must be from 0 to 1, got {self.budget}")
        if self.num_blocks != 1 and self.method not in BLOCKWISE:
            raise ValueError(f"num_blocks must be 1 for {self.method}, got {self.num_blocks}")
        self._check_devices()
        order = self.layers or self.model.depth
        partition(order, self.num_blocks, self.config().prior, split=self.split)

    def _check_devices(self) -> None:
        for name in ("data_parallel", "tensor_parallel"):
            check_number(name, getattr(self, name), 1)
        if self.batch_size % self.data_parallel:
            raise ValueError(
                f"batch_size must be a multiple of data_parallel {self.data_parallel}, "
                f"got {self.batch_size}"
            )
        if (self.devices > 1 or self.alone) and self.offload != "none":
            raise ValueError(
                f"offload must be none with several devices or blocks alone, got {self.offload}"
            )
        if self.tensor_parallel > 1 and self.method != "block_fused":
            raise ValueError(
                f"tensor_parallel must be 1 for {self.method}, got {self.tensor_parallel}"
            )

    @property
    def devices(self) -> int:
        """That train one block together, or all of the model."""
        return self.data_parallel * self.tensor_parallel

    @property
    def is_apart(self) -> bool:
        """Whether its blocks are trained one by one, each with no other on its devices.

        Blocks that read layers of each other cannot be.
        """
        several = self.devices > 1 or self.alone
        return several and self.num_blocks > 1 and self.model.independent

    @property
    def share(self) -> int:
        """Samples of a step that one device takes."""
        return self.batch_size // self.data_parallel

    @property
    def micro_batch(self) -> int:
        """Samples of one backward on one device."""
        return self.share // self.accumulate

    @property
    def objective(self) -> Objective:
        """What is trained: end to end it is the network without noise, where the family has one.

        What cuts a model into blocks trains the diffusion, also with one block.
        """
        ordinary = bool(family_named(self.family).conventional)
        return "conventional" if ordinary and self.method not in BLOCKWISE else "blocks"

    @property
    def offloads(self) -> tuple[Offload, ...]:
        """Those of OFFLOAD that it may have."""
        every = offloads_of(self.model, self.num_blocks)
        return every if self.devices == 1 and not self.is_apart else every[:1]

    def config(self) -> RunConfig:
        """The run, with the settings that `train` has by default; its data is made up."""
        entry = family_named(self.family)
        layers, split = (",".join(map(str, each or ())) for each in (self.layers, self.split))
        names = [field.name for field in fields(TrainerConfig)]
        same = {name: getattr(self, name) for name in names if hasattr(self, name)}
        sharing = "copies" if self.is_apart else self.sharing
        return RunConfig(
            family=self.family,
            model=replace(self.model, recompute=self.recompute or self.model.recompute),
            data="made up",
            weighting=entry.weighting,
            label_drop=0.0,
            mirror=False,
            shift=0,
            partition=PartitionConfig(self.num_blocks, layers, split, sharing=sharing),
            prior=entry.process_of(self.model),
            objective=self.objective,
            lora=self.lora,
            trainer=TrainerConfig(
                steps=STEPS, clip=0.0 if self.optimizer_in_backward else 1.0, **same
            ),
        )

    def trainer(self, device: torch.device | str, job: Job = ALONE) -> Trainer:
        """A trainer at its first step, on a device of this machine; its data is made up."""
        config = self.config()
        blocks = config.build(config.home(device, job), only=job.block)
        if baseline := BASELINES[self.method]:
            budget = 1.0 if self.budget is None else self.budget
            use_baseline(blocks.model, baseline, budget=budget)
        data = MadeUpData(self.model.fields(), self.batch_size)
        return config.trainer_of(blocks, data, device=device, job=job)

    def settings(self) -> Settings:
        """What a row of JSON and a budget say of it; of OTHERS, where they are not the default."""
        other: Settings = {"batch": self.batch_size, "target": self.device.name}
        usual = {each.name: each.default for each in fields(Recipe)}
        own: Settings = {n: getattr(self, n) for n in OTHERS if getattr(self, n) != usual[n]}
        given = {name: other[name] if name in other else getattr(self, name) for name in SETTINGS}
        return given | own


def offloads_of(model: ModelConfig, num_blocks: int) -> tuple[Offload, ...]:
    """What may be on the device: all blocks, or one, where none reads the layers of others."""
    return OFFLOAD if model.independent or num_blocks == 1 else OFFLOAD[:1]


def repeats(family: str, methods: Collection[str], method: str, num_blocks: int) -> bool:
    """Whether a way is end_to_end under another name, where that is among the methods too.

    One block of plain torch is, unless the family's network is another one without noise.
    """
    one = (method, num_blocks) == ("block_stock", 1) and not family_named(family).conventional
    return one and "end_to_end" in methods


def of_preset(family: str, name: str) -> Recipe:
    """A preset of a family, every setting the default.

    Raises:
        ValueError: there is no such family or preset.
    """
    return Recipe(family, name, family_named(family).model.preset(name))


def of_settings(settings: Settings) -> Recipe:
    """The recipe that `Recipe.settings` describes.

    Args:
        settings:  from a file, so that they may be anything
    Raises:
        ValueError: a name is missing or unknown, or a value is none that it may have.
    """
    known: dict[str, Any] = {**SETTINGS}
    if isinstance(settings, dict):
        known |= {name: kind for name, kind in OTHERS.items() if name in settings}
    values = require_names("settings", settings, known)
    for (name, kind), value in zip(known.items(), values, strict=True):
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            kind = getattr(kind, "__name__", kind)
            raise ValueError(f"{name} must be {kind}, got {shortened(value)}")
    others: dict[str, Any] = dict(settings)
    batch, device = others.pop("batch"), target_named(others.pop("target"))
    recipe = of_preset(others["family"], others["preset"])
    return replace(recipe, batch_size=batch, device=device, **others)


def require_names(name: str, value: object, known: Collection[str]) -> list[object]:
    """What a value holds by each name; ValueError unless it is a dictionary of just the known."""
    if not isinstance(value, dict) or set(value) != set(known):
        got = ", ".join(value) or "nothing" if isinstance(value, dict) else shortened(value)
        raise ValueError(f"{name} must have {', '.join(known)} and no more, got {got}")
    return [value[each] for each in known]


def shortened(value: object) -> str:
    """A value of JSON, or its beginning."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _require(name: str, value: object, known: Sequence[str | None]) -> None:
    if value not in known:
        *names, got = ("null" if each is None else str(each) for each in (*known, value))
        raise ValueError(f"{name} must be of {', '.join(names)}, got {got}")
