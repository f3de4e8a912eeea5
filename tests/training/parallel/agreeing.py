"""Runs of several processes beside the same runs of one, and what each has at its end."""

import json
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import NamedTuple, get_args

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from several import CPU, met
from training.tiny import CONFIGS, PROCESSES, make_data

from dbkernels.models import FAMILIES
from dbkernels.ops.layer.recompute import Recompute
from dbkernels.training.checkpoint.shard import Shard, joined
from dbkernels.training.lora_config import LoraConfig
from dbkernels.training.parallel.gradients import SharedGradients
from dbkernels.training.parallel.job import Job
from dbkernels.training.run_config import PartitionConfig, RunConfig
from dbkernels.training.trainer_config import TrainerConfig

POLICIES = get_args(Recompute)
COPIES = {"sharing": "copies"}
SHARD = {"shard": True}


@dataclass(frozen=True)
class Case:
    """A run: of a family, of one block or of all, with tensor parallelism or without."""

    family: str = "vit"
    block: int | None = 1
    tensor: int = 1
    trainer: dict = field(default_factory=dict)
    model: dict = field(default_factory=dict)
    run: dict = field(default_factory=dict)
    partition: dict = field(default_factory=lambda: COPIES)
    dtype: torch.dtype = torch.float32
    source: str = "here"  # of samples: this process, a worker, or a stream
    without: str = ""  # what is left out, so that processes go apart

    def config(self):
        entry = FAMILIES[self.family]
        model = replace(CONFIGS[self.family], **self.model)
        settings = {"steps": 3, "batch_size": 8, "lr": 1e-3, "ema": 0.9, "clip": 0.5}
        run = {"label_drop": 0.0, "mirror": False, "shift": 0, **self.run}
        return RunConfig(
            family=self.family,
            model=model,
            data="none",
            weighting=entry.weighting,
            partition=PartitionConfig(**self.partition),
            prior=PROCESSES[self.family],
            trainer=TrainerConfig(**settings | self.trainer),
            **run,
        )

    def trainer_of(self, job):
        """At its first step; adapters and gates are not zero, which would hide what is behind."""
        config, data = self.config(), make_data(24, self.family)
        blocks = config.build(CPU, only=self.block)
        torch.manual_seed(6)
        with torch.no_grad():
            for parameter in blocks.parameters():
                noise = torch.randn(parameter.shape)
                if not parameter.is_meta:
                    parameter += 0.05 * noise.to(parameter.dtype)
        if self.dtype != torch.float32:
            for parameter in blocks.parameters():
                parameter.data = parameter.data.to(self.dtype)
        if self.source == "stream":
            data = in_batches(data, config.trainer.batch_size)
        workers = int(self.source == "worker")
        return config.trainer_of(blocks, data, device=CPU, job=job, workers=workers)

    def alone(self):
        """What one process has at the end, by name, and its rows."""
        trainer = self.trainer_of(Job(self.block))
        rows = ran(trainer)
        return whole(trainer), rows


def in_batches(data, size):
    """Batches one after another, without an end."""
    for step in count():
        yield data.batch((torch.arange(size) + size * step) % len(data))


def whole(trainer):
    """All that a checkpoint holds, from what each process has."""
    job, found = trainer.placements.job, {}
    for group, named in trainer.tensors().items():
        for name, value in named.items():
            if isinstance(value, Shard):
                parts = [None] * dist.get_world_size(job.group)
                own = [(box, value.local.clone()) for box in value.boxes]
                dist.all_gather_object(parts, own, group=job.group)
                every = [each for part in parts for each in part]
                value = joined(every, value.shape, value.local.dtype)
            found[f"{group}/{name}"] = value.detach().clone()
    return found


LORA = {"lora": LoraConfig(4)}
TWO = {
    **{f"{f} {p}": Case(f, trainer=SHARD, model={"recompute": p}) 
       for f in ("vit", "dit", "mdm", "ar") for p in POLICIES},
    **{f"huginn {p}": Case("huginn", block=None, trainer=SHARD, model={"recompute": p},
       partition={"num_blocks": 1}) for p in POLICIES},
    "mmdit": Case("mmdit", trainer=SHARD),
    "activations on the host": Case("dit", trainer=SHARD | {"offload_activations": True},
        model={"dim": 64, "num_heads": 4}),
    "replicas vit": Case(),
    "replicas mdm": Case("mdm"),
    "replicas of all blocks": Case("dit", block=None, partition={}),
    "replicas muon": Case(trainer={"optimizer": "muon"}),
    "replicas of copies": Case(block=None),
    "dropout": Case(model={"dropout": 0.3, "attention_dropout": 0.3}, trainer=SHARD),
    "from a worker": Case("dit", source="worker"),
    "from a stream": Case("dit", source="stream", trainer=SHARD),
    "replicas accumulate": Case("dit", trainer={"accumulate": 2}),
    "accumulate": Case("dit", trainer={"accumulate": 2, **SHARD}),
    "no clip": Case(trainer={"clip": 0.0, **SHARD}),
    "clip all": Case(trainer={"clip": 1e-3, **SHARD}),
    "no ema": Case(trainer={"ema": 0.0, **SHARD}),
    "autocast": Case("dit", trainer={"autocast": True, **SHARD}),
    "bfloat16": Case(dtype=torch.bfloat16, trainer=SHARD),
    "bfloat16 replicas": Case(dtype=torch.bfloat16),
    "adapters": Case("dit", run=LORA, trainer=SHARD),
    "all blocks": Case("dit", block=None, partition={}, trainer=SHARD),
    "all layers end to end": Case("vit", block=None, partition={"num_blocks": 1}, trainer=SHARD),
    "conventional": Case("huginn", block=None, partition={"num_blocks": 1},
                         run={"objective": "conventional"}, trainer=SHARD),
    "huginn": Case("huginn", block=None, partition={}, trainer=SHARD),
    "augmented": Case("dit", run={"label_drop": 0.4, "mirror": True, "shift": 1}, trainer=SHARD),
    "offloaded activations": Case("dit", trainer={"offload_activations": True}),
    "offloaded activations beside shares": Case(
        "dit", trainer={"offload_activations": True, **SHARD}
    ),
    "tensor vit": Case(tensor=2),
    "tensor mdm": Case("mdm", tensor=2),
    "tensor ar": Case("ar", tensor=2, model={"recompute": "layer"}),
    "tensor all blocks": Case("dit", tensor=2, block=None, partition={}),
    "tensor accumulate": Case("dit", tensor=2, trainer={"accumulate": 2}),
    "apart": Case(without="gradients"),
    "same half": Case(trainer=SHARD, without="shares"),
}  # fmt: skip
FOUR = {
    "two by two vit": Case(tensor=2, trainer=SHARD),
    "two by two dit": Case("dit", tensor=2, trainer={"accumulate": 2, **SHARD}),
    "two by two replicas": Case("dit", tensor=2),
    "fewer rows than processes": Case(trainer=SHARD),
}


@contextmanager
def without(what):
    """Leave something out that processes must do, to see that it is noticed."""
    left_out = {
        "": (),
        "gradients": ((SharedGradients, "_send", lambda self, parameter: None),),
        "shares": ((Job, "share", lambda self, size, *_: slice(0, size // self.data.size)),),
    }[what]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in left_out]
    try:
        for owner, name, value in left_out:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def train_cases(cases, folder, rank):
    """Each case in its place; the first process writes what comes of it, each what it held."""
    torch.use_deterministic_algorithms(True)
    for name, case in cases.items():
        with met(block=case.block, tensor=case.tensor) as job, without(case.without):
            try:
                trainer = case.trainer_of(job)
                rows = ran(trainer)
                tensors = whole(trainer)
            except Exception as error:
                raise RuntimeError(name) from error
            path = Path(folder) / name
            path.with_suffix(f".held{rank}").write_text(json.dumps(boxes(trainer)))
            if not rank:
                save_file({k: v.contiguous() for k, v in tensors.items()}, path)
                path.with_suffix(".rows").write_text(json.dumps(rows))


def ran(trainer):
    """The rows of its steps to the end."""
    rows = []
    trainer.run(rows.append)
    return rows


def boxes(trainer):
    """Of what is in parts, the shape of the whole, what is here, and where it lies in the whole."""
    return {
        f"{group}/{name}": (value.shape, value.local.shape, value.boxes)
        for group, named in trainer.tensors().items()
        for name, value in named.items()
        if isinstance(value, Shard)
    }


class Found(NamedTuple):
    """What came of a case."""

    tensors: dict
    rows: list
    held: list  # by process


def found_in(folder, name, size):
    path = Path(folder) / name
    of_ranks = [path.with_suffix(f".held{rank}").read_text() for rank in range(size)]
    rows = json.loads(path.with_suffix(".rows").read_text())
    return Found(load_file(path), rows, [json.loads(text) for text in of_ranks])
