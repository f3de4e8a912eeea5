"""Checkpoints that come back exactly as they were saved, or are refused.

    root/step-00000123/  model.safetensors  ema.safetensors  optimizer.safetensors  state.json

A save writes a hidden sibling directory, makes it durable and publishes it with one rename.
state.json has the size and sha256 of every file, and its own sha256. Nothing is ever unpickled.
Tensors are hashed while they are written, in pieces (`tensor_file`). One process saves into a root
at a time, or several of one job together, and its threads one after another; any number may read it
meanwhile. Of several, each writes files of its own, `model.0of4.safetensors`, and state.json also
says where the pieces of their tensors lie (`shard`).
"""

from dbkernels.training.checkpoint.loading import load, load_latest
from dbkernels.training.checkpoint.manifest import (
    FORMAT,
    FORMAT_OF_SHARDS,
    STATE_FILE,
    as_json,
    check_state,
)
from dbkernels.training.checkpoint.root import check_root, latest
from dbkernels.training.checkpoint.saver import Saver
from dbkernels.training.checkpoint.saving import save
from dbkernels.training.checkpoint.shard import Box, Shard, Tensors

__all__ = [
    "FORMAT",
    "FORMAT_OF_SHARDS",
    "STATE_FILE",
    "Box",
    "Saver",
    "Shard",
    "Tensors",
    "as_json",
    "check_root",
    "check_state",
    "latest",
    "load",
    "load_latest",
    "save",
]
