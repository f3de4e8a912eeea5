"""Runs of the command line for its tests: tiny data, tiny models, and what was printed."""

import fcntl
import json
import time
from collections import namedtuple

import numpy as np

SIZES = ["--depth=3", "--dim=16", "--num-heads=2", "--steps=2", "--batch-size=8", "--device=cpu"]


Outcome = namedtuple("Outcome", "code out err")


def write_npz(path, shape=(1, 8, 8), classes=3):
    """24 images of noise in 3 classes, and 9 to test on."""
    images = np.random.default_rng(0).integers(0, 256, (24, *shape), dtype=np.uint8)
    labels = np.arange(24) % classes
    np.savez(path, images=images, labels=labels, test_images=images[:9], test_labels=labels[:9])


def write_captions(folder, channels=1, pooled=True, side=8):
    """Both splits of 8 images and texts, and two prompts."""
    random = np.random.default_rng(0)
    shapes = {"": (channels, side, side), "_text": (3, 5)}
    shapes |= {"_pooled": (6,)} if pooled else {}
    for split in ("", "_test"):
        for end, shape in shapes.items():
            np.save(folder / f"z{split}{end}.npy", random.normal(size=(8, *shape)).astype("f4"))
    made = {end[1:]: random.normal(size=(2, *shape)) for end, shape in shapes.items() if end}
    np.savez(folder / "prompts.npz", **{name: array.astype("f4") for name, array in made.items()})


def refused(outcome, message):
    """Whether a run ended as a mistake does: exit 1 and one line that holds the message."""
    assert outcome.code == 1, outcome
    assert outcome.out == ""
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    assert message in outcome.err
    return True


def rows_of(outcome):
    """The JSON objects that a run printed."""
    assert outcome.code == 0, outcome
    return [json.loads(line) for line in outcome.out.splitlines()]


def read_tree(directory):
    return {p: p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


class Lock:
    """A file that a process locks for as long as it, or one that inherits it, lives."""

    def __init__(self, path):
        self.path = path

    def is_free(self):
        with self.path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        return True


def until(condition, seconds=30):
    """Wait for something that another process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
