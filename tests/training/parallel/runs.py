"""Runs whose blocks share nothing, in jobs of their own and in one."""

from pathlib import Path

from training.tiny import equal

from dbkernels.training import checkpoint
from dbkernels.training.parallel.job import Job
from dbkernels.training.run import train
from dbkernels.training.run_config import read_config

RUN, WHOLE = Path("run"), Path("whole")
COPIES = {"sharing": "copies"}


def open_data(config):
    return config.model.open(config.data, "train")


def train_block(config, block=None, name="run", **options):
    """Train one block into its directory of a run; None trains all."""
    return train(config, Path(name), device="cpu", job=Job(block), **options)


def train_apart(config, name="run", **options):
    """Train each block alone, the last one first: none waits for another."""
    for block in reversed(range(config.partition.num_blocks)):
        train_block(config, block, name, **options)


def read(directory):
    path = checkpoint.latest(directory / "checkpoints")
    return path.name, *checkpoint.load(path)


def assert_same_runs(directory=RUN, other=WHOLE):
    """In every bit that is saved and logged, but for where they lie."""
    (name, tensors, state), (expected_name, expected, expected_state) = map(
        read, (directory, other)
    )
    assert name == expected_name
    assert tensors.keys() == expected.keys()
    for group in expected:
        assert equal(tensors[group], expected[group]), group
    assert state == expected_state
    assert (directory / "log.jsonl").read_bytes() == (other / "log.jsonl").read_bytes()
    assert read_config(directory) == read_config(other)
