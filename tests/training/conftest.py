from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from training.tiny import CONFIGS, PROCESSES

from dbkernels.data.token_files import write_tokens
from dbkernels.models import FAMILIES
from dbkernels.training import run
from dbkernels.training.run_config import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig


@pytest.fixture
def make_config(tmp_path, monkeypatch):
    """Makes configurations of runs in a directory of their own, which has their data."""
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).standard_normal((12, 1, 4, 4)).astype(np.float32))
    np.save("data_labels.npy", np.arange(12) % 3)
    for name, shape in (("", (1, 4, 4)), ("_text", (3, 5)), ("_pooled", (2,))):
        np.save(f"captions{name}.npy", np.random.default_rng(1).random((12, *shape), np.float32))
    tokens = np.random.default_rng(0).integers(0, 3, (6, 48))  # two windows each
    write_tokens("tokens", {"train": tokens}, vocabulary=3)
    trainer = TrainerConfig(steps=4, batch_size=4, lr=1e-2, ema=0.9)
    fields = {"label_drop": 0.0, "mirror": False, "shift": 0, "stride": 0, "objective": "blocks"}
    fields |= {"rand_augment": False}

    def make(family="vit", *, partition=None, **changes):
        of_field = {"token": "tokens", "text": "captions.npy", "label": "data.npy"}
        data = next(of_field[name] for name in of_field if name in CONFIGS[family].fields())
        own = {"weighting": FAMILIES[family].weighting, "prior": PROCESSES[family], **fields}
        own["data"] = data
        own |= {name: changes.pop(name) for name in own if name in changes}
        own |= {"partition": PartitionConfig(**partition or {})}
        own |= {"trainer": replace(trainer, **changes)}
        return RunConfig(family=family, model=CONFIGS[family], **own)

    return make


@pytest.fixture
def train():
    """Trains a run on this processor, in a directory of this name."""
    return lambda config, name="run", **options: run.train(
        config, Path(name), device="cpu", **options
    )
