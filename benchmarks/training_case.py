"""One model's training step, and every way in which it is trained."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from layer_case import Competitor

from dbkernels.diffusion.gaussian import LogNormal
from dbkernels.models.baseline import Baseline
from dbkernels.models.registry import family_named
from dbkernels.planning.recipe import BASELINES, BLOCKWISE
from dbkernels.training.run import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig

METHODS = (
    "end_to_end",
    "compiled",
    "checkpointed",
    "selective",
    "block_stock",
    "block_fused",
)
STEPS = 10**6  # of a run that no benchmark ends
LR = 1e-6  # every way trains the same parameters, whose size it should leave alone


@dataclass(frozen=True)
class Way:
    """How a model is trained."""

    method: str  # of METHODS
    num_blocks: int = 1
    recompute: str | None = None  # of the fused layer
    budget: float | None = None  # of activation memory, 1 is all; for compiled
    offload: str = "none"  # none has all blocks on the device, cpu one
    optimizer_in_backward: bool = False  # parameters are updated as their gradients come
    launch: str = "ops"  # one by one, or the step as one CUDA graph

    @property
    def baseline(self) -> Baseline | None:
        """What runs the layers; None is the fused layer."""
        return BASELINES.get(self.method, "stock")

    @property
    def name(self) -> str:
        """In words, for messages."""
        blocks = f"in {self.num_blocks} block{'s' if self.num_blocks > 1 else ''}"
        parts = [
            " ".join(filter(None, [self.method.replace("_", " "), self.recompute, blocks])),
            self.budget is not None and f"budget {self.budget}",
            self.offload == "cpu" and "offload cpu",
            self.optimizer_in_backward and "optimizer in backward",
            self.launch == "graph" and "as a graph",
        ]
        return ", ".join(part for part in parts if part)

    def implementation(self, device: torch.device) -> str:
        """What computes the layers."""
        impls = {"block_fused": "fused", "compiled": "compiled"}
        return Competitor(impls.get(self.method, "eager")).implementation(device)


def ways(
    methods: Sequence[str],
    num_blocks: Sequence[int],
    policies: Sequence[str],
    budgets: Sequence[float],
    offload: Sequence[str],
    optimizer_in_backward: Sequence[bool],
    launch: Sequence[str],
) -> list[Way]:
    """Every way there is, in the order of `methods`.

    Args:
        methods:     of METHODS; end to end comes once, block by block for each number of blocks
        num_blocks:  1 of the fused layer is end to end too
        policies:    of the fused layer
        budgets:     of the compiled one
        offload:     of the fused layer; the published code, which is stock, has all blocks there
        optimizer_in_backward:  True only where memory is the aim: end to end, checkpointed, and
                     the fused layer with no other block on the device
        launch:      of the fused layer
    """
    found = []
    for method in methods:
        for count in num_blocks if method in BLOCKWISE else (1,):
            for way in _variants(Way(method, count), policies, budgets, offload):
                found += _steps(way, optimizer_in_backward, launch)
    # one block of plain torch is end to end
    twice = Way("block_stock", 1) if "end_to_end" in methods else None
    return [way for way in found if way != twice]


def _variants(
    way: Way, policies: Sequence[str], budgets: Sequence[float], offload: Sequence[str]
) -> list[Way]:
    if way.method == "compiled":
        return [replace(way, budget=budget) for budget in budgets]
    if way.method != "block_fused":
        return [way]
    # one block is all that there is
    places = offload if way.num_blocks > 1 else ("none",)
    return [
        replace(way, recompute=recompute, offload=place)
        for place in places
        for recompute in policies
    ]


def _steps(way: Way, optimizer_in_backward: Sequence[bool], launch: Sequence[str]) -> list[Way]:
    fused = way.method == "block_fused"
    alone = way.offload == "cpu" or way.num_blocks == 1
    saves = way.method in ("end_to_end", "checkpointed") or (fused and alone)
    return [
        replace(way, optimizer_in_backward=end, launch=each)
        for end in (optimizer_in_backward if saves else (False,))
        for each in (launch if fused else ("ops",))
    ]


@dataclass(frozen=True)
class TrainingCase:
    """A model and its batch; the samples are made up."""

    family: str  # vit or dit
    preset: str
    batch: int
    dtype: str  # float32, or autocast: parameters of float32, compute in bfloat16

    @property
    def compute_dtype(self) -> torch.dtype:
        """Of the matmuls."""
        return torch.bfloat16 if self.dtype == "autocast" else torch.float32

    @property
    def depth(self) -> int:
        """Number of layers."""
        return family_named(self.family).model.preset(self.preset).depth

    def config(self, way: Way, depth: int | None = None) -> RunConfig:
        """A run that trains the model in one way, all other things being equal.

        Args:
            way:    how
            depth:  layers of a model that is shallower, but else the same
        """
        model = family_named(self.family).model.preset(self.preset)
        model = replace(model, depth=depth or model.depth)
        return RunConfig(
            family=self.family,
            model=replace(model, recompute=way.recompute or model.recompute),
            data="made up",
            weighting=family_named(self.family).weighting,
            label_drop=0.0,
            mirror=False,
            shift=0,
            partition=PartitionConfig(num_blocks=way.num_blocks),
            prior=LogNormal(),
            trainer=TrainerConfig(
                steps=STEPS,
                batch_size=self.batch,
                lr=LR,
                clip=0.0 if way.optimizer_in_backward else 1.0,
                optimizer_in_backward=way.optimizer_in_backward,
                cuda_graphs=way.launch == "graph",
                autocast=self.dtype == "autocast",
                offload=way.offload,
            ),
        )
