"""Blocks learn a language: real text, read in windows that no step has seen."""

import math
import re
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from training.tiny import Text

from dbkernels.models import FAMILIES
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.trainer import Trainer

SYMBOLS = " abcdefghijklmnopqrstuvwxyz"
LENGTH = 48


def english():
    """Python's own manual in 27 symbols, in windows to train on and to hold out."""
    text = re.sub("[^a-z]+", " ", " ".join(topics.values()).lower())
    token = torch.from_numpy(np.frombuffer(text.encode(), np.uint8).astype(np.int64))
    token = torch.where(token == ord(" "), 0, token - ord("a") + 1)
    windows = token[: len(token) // LENGTH * LENGTH].view(-1, LENGTH)
    return [Text(part, len(SYMBOLS)) for part in windows.split([len(windows) - 256, 256])]


# blocks, steps of each, windows of a step, and what the family has beside its sizes
HOW = {
    "mdm": (3, 120, 32, {}),
    "ar": (3, 80, 16, {}),
    "huginn": (1, 60, 16, {"prelude": 1, "coda": 1}),
}


def trained(family, data):
    """Blocks that have read some of the text."""
    (num_blocks, steps, batch_size, own), entry = HOW[family], FAMILIES[family]
    sizes = {"mlp_hidden": 128, "cond_dim": 32, "length": LENGTH, "vocabulary": len(SYMBOLS)}
    torch.manual_seed(0)
    model = entry.model(entry.config(dim=64, depth=3, num_heads=4, **sizes, **own))
    blocks = DiffusionBlocks(model, num_blocks, process=entry.process, weighting=entry.weighting)
    how = {"lr": 5e-3, "warmup": 20, "decay": "cosine"}
    Trainer(blocks, data, steps=steps, batch_size=batch_size, **how).run()
    return blocks


@pytest.mark.parametrize("family", HOW)
def test_blocks_learn_more_of_a_text_than_how_often_its_letters_come(family):
    train, held_out = english()
    share = torch.bincount(train.token.flatten()) / train.token.numel()
    entropy = -float((share * share.log2()).sum())
    blocks = trained(family, train)
    found = blocks.evaluate(held_out, **({} if family == "mdm" else {"starts": 0}))
    assert found.bits < entropy - 0.15 < 4
    assert found.bits * math.log(2) > 1, "a bound that no model of English reaches"
    if family != "mdm":
        assert found.most_noise < entropy
        return
    # a block knows the more, the fewer tokens are masked; the unigram has a third in each
    assert entropy / 3 > found.blocks[0] > found.blocks[1] > found.blocks[2]
    again = blocks.evaluate(held_out, batch_size=100)
    assert (again.bits, again.blocks) == (found.bits, found.blocks)
