"""Runs whose blocks share nothing, in jobs of their own and in one."""

from pathlib import Path

from dbkernels.training.parallel.job import Job
from dbkernels.training.run import train

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
