"""Blocks learn a language: real text, read in windows that no step has seen."""

import math
import re
from pydoc_data.topics import topics

import numpy as np
import torch
from training.tiny import Text

from dbkernels.models import MDM, MDMConfig
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
    return [Text(part, len(SYMBOLS)) for part in windows.split([len(windows) - 512, 512])]


def test_masked_blocks_learn_more_of_a_text_than_how_often_its_letters_come():
    train, held_out = english()
    share = torch.bincount(train.token.flatten()) / train.token.numel()
    entropy = -float((share * share.log2()).sum())
    sizes = {"mlp_hidden": 128, "cond_dim": 32, "length": LENGTH, "vocabulary": len(SYMBOLS)}
    torch.manual_seed(0)
    blocks = DiffusionBlocks(MDM(MDMConfig(dim=64, depth=3, num_heads=4, **sizes)), 3)
    Trainer(blocks, train, steps=200, batch_size=32, lr=5e-3, warmup=20, decay="cosine").run()
    found = blocks.evaluate(held_out)
    assert found.bits < entropy - 0.15 < 4
    # a block knows the more, the fewer tokens are masked; the unigram has a third in each
    assert entropy / 3 > found.blocks[0] > found.blocks[1] > found.blocks[2]
    assert found.bits * math.log(2) > 1, "a bound that no model of English reaches"
    again = blocks.evaluate(held_out, batch_size=100)
    assert (again.bits, again.blocks) == (found.bits, found.blocks)
