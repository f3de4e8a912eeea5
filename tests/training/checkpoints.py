"""Tiny checkpoints whose step is in what they hold."""

import torch

from dbkernels.training.checkpoint import load, save


def numbered(step):
    return {"model": {"w": torch.full((3,), step)}, "ema": {"w": -torch.ones(1)}}, {"step": step}


def saved(root, *steps, keep=9):
    return [save(root, step, *numbered(step), keep=keep) for step in steps]


def names(root):
    return sorted(path.name for path in root.iterdir())


def bits(tensors):
    return {
        (group, name): (t.dtype, t.shape, t.flatten().view(torch.uint8).tolist())
        for group, named in tensors.items()
        for name, t in named.items()
    }


def assert_holds(path, step):
    tensors, state = load(path)
    assert (bits(tensors), state) == (bits(numbered(step)[0]), {"step": step})
