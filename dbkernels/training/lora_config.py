"""The adapters of a run, which then trains nothing else."""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import nn

from dbkernels.models.adapter import DEFAULT, add_adapters, check_targets
from dbkernels.settings import check_choice, check_number

Base = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class LoraConfig:
    """Adapters on every layer, and what of it they stand on."""

    rank: int = 0
    """0 has none: the network itself is trained."""
    alpha: float = 0.0
    """The adapters are added alpha / rank times; 0 is rank."""
    targets: str = ",".join(DEFAULT)
    """q, k, v or qkv, out, fc1, fc2, modulation: some of them, comma separated."""
    base: Base = "float32"
    """Dtype of all that is frozen, and so of the layers' branches."""

    def __post_init__(self) -> None:
        check_number("lora", self.rank, 0)
        check_number("lora_alpha", self.alpha, 0)
        check_targets(self.targets.split(","))
        check_choice("lora_base", self.base, get_args(Base))
        given = self.alpha, self.targets, self.base
        if not self.rank and given != (0.0, LoraConfig.targets, LoraConfig.base):
            raise ValueError(
                "lora must be at least 1 where lora_alpha, lora_targets or lora_base is given, "
                "got 0"
            )

    def add_to(self, model: nn.Module, seed: int) -> None:
        """Give every layer of a model its adapters, drawn from a seed, and freeze the rest.

        Raises:
            ValueError: the rank is above the width of a target.
        """
        if not self.rank:
            return
        with torch.random.fork_rng(devices=[]):
            # other numbers than those that the model's own weights were drawn from
            torch.manual_seed(seed + 1)
            targets = self.targets.split(",")
            add_adapters(model, rank=self.rank, alpha=self.alpha or None, targets=targets)
        if self.base != "float32":
            for parameter in model.parameters():
                if not parameter.requires_grad:
                    parameter.data = parameter.data.to(torch.bfloat16)


NO_LORA = LoraConfig()
