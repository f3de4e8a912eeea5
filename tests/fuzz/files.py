"""Fuzz of the files that are read: no traceback, no hang, no success on what is damaged.

    python tests/fuzz/files.py --cases 2000 --seed 1

A case is a file that was good, with one to three damages. Its reader must refuse it in one
sentence, a ValueError or an OSError, or read what makes sense: where the format has a checksum,
just what was there before.
"""

import random
import struct
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from forked import forked

from dbkernels.data.images import open_data
from dbkernels.planning import budgets
from dbkernels.training import checkpoint
from dbkernels.training.log import RunLog, read_log
from dbkernels.training.run import read_config

CRAFTED = [
    b"", b"\0" * 64, b"{}", b"[]", b"null", b"5", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe{}",
    *(b"\x93NUMPY\x01\0\x76\0{'descr': '%b', 'fortran_order': False, 'shape': (%b), }\n" % header
      for header in ((b"<f4", b"-1, 4, 2, 2"), (b"<f4", b"2**62, 4, 2, 2"), (b"|O", b"2,"))),
    b"\x93NUMPY\x02\x00\xff\xff\xff\x7f{", b"PK\x05\x06" + b"\0" * 18,
    b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 2**30, 2**30, 8, 2, 0, 0, 0),
]  # fmt: skip


@dataclass(frozen=True)
class Fuzz:
    """Fuzz the readers of files."""

    cases: int = 2000
    """Damaged files that are read."""
    seed: int = 1
    """Seed of the damages."""


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Args:
        path:     of the file that is damaged
        read:     what it holds, or everything that is read with it
        checked:  whether the format has a checksum, so that what is read must be what was there
    """

    path: Path
    read: Callable[[], object]
    checked: bool = False


def samples(source: Path) -> list[np.ndarray]:
    """All samples of a source of data, which must be finite and labelled."""
    found = []
    for split in ("train", "test"):
        data = open_data(source, split)
        batch = data.batch(torch.arange(len(data)))
        assert batch["image"].isfinite().all() and batch["image"].ndim == 4
        assert batch["label"].min() >= 0 and batch["label"].max() < data.num_classes
        found += [batch["image"].numpy(), batch["label"].numpy()]
    return found


def formats(root: Path) -> dict[str, Format]:
    """One good file of each kind, in a directory each."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(6) % 2
    both = dict(images=images, labels=labels, test_images=images, test_labels=labels)
    found = {}
    for name, save in (("stored", np.savez), ("compressed", np.savez_compressed)):
        save(root / f"{name}.npz", **both)
        path = root / f"{name}.npz"
        found[name] = Format(path, partial(samples, path), checked=True)
    for suffix in ("", "_test"):
        np.save(root / f"latents{suffix}.npy", images[:, :, :2, :2].astype(np.float32))
        np.save(root / f"latents{suffix}_labels.npy", labels)
    for name in ("latents", "latents_labels"):
        found[name] = Format(root / f"{name}.npy", partial(samples, root / "latents.npy"))
    for suffix in ("png", "jpg", "webp", "bmp"):
        folder = root / suffix
        for split in ("train", "test"):
            (folder / split / "a").mkdir(parents=True)
            for i, image in enumerate(images[:2]):
                picture = Image.fromarray(image.transpose(1, 2, 0))
                picture.save(folder / split / "a" / f"{i}.{suffix}")
        found[suffix] = Format(folder / f"train/a/1.{suffix}", partial(samples, folder))
    (cifar := root / "cifar").mkdir()
    for name in ("train.bin", "test.bin"):
        records = rng.integers(0, 100, (2, 2 + 3 * 32 * 32), dtype=np.uint8)
        records.tofile(cifar / name)
    found["cifar"] = Format(cifar / "train.bin", partial(samples, cifar))
    return found | run_formats(root / "run")


def run_formats(run: Path) -> dict[str, Format]:
    """The files of a run, as training writes them."""
    from dbkernels.cli.main import main

    sizes = "--data digits --depth 2 --num-blocks 2 --dim 16 --num-heads 2 --steps 2 --batch-size 4"
    forked(lambda: main(f"train vit --out {run} {sizes} --device cpu --save-every 2".split()), 120)
    newest = checkpoint.latest(run / "checkpoints")
    read = partial(checkpoint.load, newest)
    (run / "budgets.json").write_text(Path(ROOT / "benchmarks/budgets.json").read_text())
    return {
        "config": Format(run / "config.json", partial(read_config, run)),
        "log": Format(run / "log.jsonl", partial(read_rows, run)),
        "budgets": Format(run / "budgets.json", partial(budgets.read, run / "budgets.json")),
        "manifest": Format(newest / "state.json", read, checked=True),
        "weights": Format(newest / "model.safetensors", read, checked=True),
    }


ROOT = Path(__file__).parents[2]


def read_rows(run: Path) -> object:
    """What a log holds for those who read it, and a resumed run that goes on with it."""
    rows = list(read_log(run / "log.jsonl"))
    RunLog(run, first_step=2).close()
    return rows


def damaged(good: bytes, rng: random.Random) -> bytes:
    """A file's bytes after one to three damages."""
    data = bytearray(good)
    for _ in range(rng.randint(1, 3)):
        # headers are short, and matter most
        at = rng.randrange(min(len(data), rng.choice((64, 300, 2**30))) or 1)
        match rng.randrange(7):
            case 0 if data:
                data[min(at, len(data) - 1)] ^= 1 << rng.randrange(8)
            case 1:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 2:
                del data[at:]
            case 3:
                data[at : at + rng.randint(1, 64)] = b"\0" * rng.randint(0, 64)
            case 4:
                data += bytes(rng.randrange(256) for _ in range(rng.randint(1, 40)))
            case 5:
                number = rng.choice((2**62, 2**31, -1, 2**63 - 1))
                data[at : at + 8] = struct.pack("<q", number)
            case _:
                digits = rng.choice((b"-1", b"9" * 20, b"1e999", b"NaN", b"null", b"{}"))
                data[at : at + len(digits)] = digits
    return bytes(data)


def same(one: object, other: object) -> bool:
    """Whether two readers gave the same, bit for bit."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(v, other[k]) for k, v in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, np.ndarray):
        return one.shape == other.shape and one.tobytes() == other.tobytes()
    return one == other


def case(form: Format, good: object) -> None:
    """Read a damaged file: exit 0 for what makes sense, 3 for a refusal, 4 for wrong numbers."""
    try:
        found = form.read()
    except (ValueError, OSError) as error:
        words = str(error)
        assert words and "\n" not in words and len(words) < 2000, words[:300]
        sys.exit(3)
    sys.exit(4 if form.checked and not same(found, good) else 0)


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Read so many damaged files, print each that ends wrong, and count them."""
    rng, wrong = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as directory:
        known = formats(Path(directory))
        originals = {name: (form.path.read_bytes(), form.read()) for name, form in known.items()}
        for index in range(cases):
            name = rng.choice(list(known))
            form, (data, good) = known[name], originals[name]
            crafted = rng.random() < 0.1
            bad = rng.choice(CRAFTED) if crafted else damaged(data, rng)
            form.path.write_bytes(bad)
            ended = forked(partial(case, form, good))
            if ended.code not in (0, 3):
                words = {None: "hang", 4: "other numbers"}.get(ended.code, f"exit {ended.code}")
                wrong[f"{name}: {words}"] += 1
                print(f"{index}: {name}: {words}: {ended.err.strip()[-200:]}", flush=True)
            form.path.write_bytes(data)
    return wrong


def run(arguments: Sequence[str] | None = None) -> None:
    asked = tyro.cli(Fuzz, args=arguments)
    found = fuzz(asked.cases, asked.seed)
    print(f"{asked.cases} files: {dict(found) or 'none was read wrong'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    run()
