from dataclasses import replace

import pytest
from training.parallel.runs import COPIES

from dbkernels.training.lora_config import LoraConfig


@pytest.fixture
def make_copies(make_config):
    """Makes configurations of blocks that share nothing."""

    def make(family="vit", lora=0, model=None, **changes):
        partition = {**COPIES, **changes.pop("partition", {})}
        config = make_config(family, partition=partition, **{"steps": 3, **changes})
        if model:
            config = replace(config, model=replace(config.model, **model))
        return replace(config, lora=LoraConfig(lora)) if lora else config

    return make
