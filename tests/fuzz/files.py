"""Fuzz of the files that are read: no traceback, no hang, no success on what is damaged.

    python tests/fuzz/files.py --cases 2000 --seed 1

A case is a file that was good, with one to three damages. Its reader must refuse it in one
sentence, a ValueError or an OSError, or read what makes sense: where the format has a checksum,
just what was there before.
"""

import hashlib
import json
import os
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

from dbkernels.data.captions import open_captions, read_prompts
from dbkernels.data.images import open_data
from dbkernels.planning import budgets
from dbkernels.training import checkpoint
from dbkernels.training.log import RunLog, read_log
from dbkernels.training.run import load_run

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
        read:     what it holds, or everything that is read with it; what it is given is called
                  where the file is open and nothing but its header was read
        checked:  whether the format has a checksum, so that what is read must be what was there
        craft:    another way to damage it, of which its parser knows nothing
    """

    path: Path
    read: Callable[[Callable[[], object]], object]
    checked: bool = False
    craft: Callable[[bytes, random.Random], bytes] | None = None


def nothing() -> None:
    pass


def samples(source: Path, opened: Callable[[], object] = nothing) -> list[np.ndarray]:
    """All samples of a source of data, which must be finite and labelled."""
    splits = [open_data(source, split) for split in ("train", "test")]
    opened()
    found = []
    for data in splits:
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
    return found | caption_formats(root, rng) | run_formats(root / "run")


def caption_formats(root: Path, rng: np.random.Generator) -> dict[str, Format]:
    """Images with embeddings of their texts, and prompts."""
    arrays = {"": (4, 3, 4, 4), "_text": (4, 5, 6), "_pooled": (4, 7)}
    arrays = {end: rng.normal(size=shape).astype(np.float16) for end, shape in arrays.items()}
    for end, array in arrays.items():
        np.save(root / f"captions{end}.npy", array)

    def read(opened: Callable[[], object]) -> object:
        data = open_captions(root / "captions.npy")
        opened()
        batch = data.batch(torch.arange(len(data)))
        assert all(t.isfinite().all() and len(t) == len(data) for t in batch.values())
        return list(batch.values())

    prompts = root / "prompts.npz"
    np.savez(prompts, text=arrays["_text"], pooled=arrays["_pooled"])
    names = [f"captions{end}" for end in arrays]
    return {
        **{name: Format(root / f"{name}.npy", read) for name in names},
        "prompts": Format(prompts, lambda opened: list(read_prompts(prompts).values()), True),
    }


def run_formats(run: Path) -> dict[str, Format]:
    """The files of a run, as training writes them."""
    from dbkernels.cli.main import main

    sizes = "--data digits --depth 2 --num-blocks 2 --dim 16 --num-heads 2 --steps 2 --batch-size 4"
    forked(lambda: main(f"train vit --out {run} {sizes} --device cpu --save-every 2".split()), 120)
    newest = checkpoint.latest(run / "checkpoints")

    def read(opened: Callable[[], object]) -> object:
        return checkpoint.load(newest)

    def used(opened: Callable[[], object]) -> object:
        return {name: p.detach() for name, p in load_run(run, device="cpu")[1].named_parameters()}

    (held := run / "budgets.json").write_text(Path(ROOT / "benchmarks/budgets.json").read_text())
    return {
        "config": Format(run / "config.json", used, craft=other_json),
        "log": Format(run / "log.jsonl", lambda opened: read_rows(run), craft=other_rows),
        "budgets": Format(held, lambda opened: budgets.read(held), craft=other_json),
        "manifest": Format(newest / "state.json", read, checked=True),
        "state": Format(newest / "state.json", used, craft=other_manifest),
        "weights": Format(newest / "model.safetensors", read, checked=True),
    }


ROOT = Path(__file__).parents[2]


ODD = [
    None,
    -1,
    0,
    1e300,
    2**62,
    2.5,
    True,
    "",
    "x",
    "[/]",
    [],
    {},
    [1],
    {"a": 1},
    "../x",
    "9" * 99,
]


def other_value(value: object, rng: random.Random) -> object:
    """A value of JSON in which one is another, or is missing."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        value = value.copy()
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if rng.random() < 0.1:
            del value[key]
        else:
            value[key] = other_value(value[key], rng)
        return value
    return rng.choice(ODD)


def other_json(data: bytes, rng: random.Random) -> bytes:
    return json.dumps(other_value(json.loads(data), rng)).encode()


def other_rows(data: bytes, rng: random.Random) -> bytes:
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    lines[at] = other_json(lines[at], rng)
    return b"\n".join(lines) + b"\n"


def other_manifest(data: bytes, rng: random.Random) -> bytes:
    """A manifest of other values whose hash is right."""
    manifest = json.loads(data)
    del manifest["self"]
    manifest = other_value(manifest, rng)
    if not isinstance(manifest, dict):
        return json.dumps(manifest).encode()
    words = partial(json.dumps, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(words(manifest).encode()).hexdigest()
    return words(manifest | {"self": digest}).encode()


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


def case(form: Format, good: object, size: int | None) -> None:
    """Read a damaged file: exit 0 for what makes sense, 3 for a refusal, 4 for wrong numbers.

    Args:
        form:  of the file
        good:  what was there before
        size:  bytes to which the file is cut when it is open; None where it is damaged already
    """
    cut = nothing if size is None else partial(os.truncate, form.path, size)
    try:
        found = form.read(cut)
    except (ValueError, OSError) as error:
        words = str(error)
        assert words and "\n" not in words and len(words) < 2000, words[:300]
        sys.exit(3)
    # what is cut off may not be what is read
    sys.exit(4 if (form.checked or size is not None) and not same(found, good) else 0)


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Read so many damaged files, print each that ends wrong, and count them."""
    rng, wrong = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as directory:
        known = formats(Path(directory))
        originals = {n: (form.path.read_bytes(), form.read(nothing)) for n, form in known.items()}
        for index in range(cases):
            name = rng.choice(list(known))
            form, (data, good) = known[name], originals[name]
            kind, size = rng.random(), None
            if kind < 0.1:
                form.path.write_bytes(rng.choice(CRAFTED))
            elif kind < 0.4 and form.craft:
                form.path.write_bytes(form.craft(data, rng))
            elif kind < 0.4:
                size = rng.randrange(len(data))
            else:
                form.path.write_bytes(damaged(data, rng))
            ended = forked(partial(case, form, good, size))
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
