"""Fuzz of the command line: no traceback, no hang, and no success on nonsense.

    python tests/fuzz/cli.py --cases 400 --seed 1

A case is a command that works, with one to three of its flags given other values. Some values are
nonsense for the type of the flag; a command that has one must fail, and say why in one sentence.
"""

import os
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import get_args, get_origin, get_type_hints

import numpy as np
import tyro
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from forked import Ended, forked

from dbkernels.cli.doctor import Doctor
from dbkernels.cli.evaluate import Evaluate
from dbkernels.cli.main import main
from dbkernels.cli.plan import Plan
from dbkernels.cli.profile import Profile
from dbkernels.cli.sample import Sample
from dbkernels.cli.train import Train

SIZES = "--data data.npz --depth 3 --dim 16 --num-heads 2 --steps 2 --batch-size 8 --device cpu"
ONE = (
    "--preset digits --batch 2 --num-blocks 1 --methods block_fused --recompute none --offload none"
)
COMMANDS = [
    (Train, f"train vit --out out {SIZES}"),
    (Train, f"train dit --out out {SIZES}"),
    (Sample, "sample dit --out x.png --per-class 1 --levels 2 --device cpu"),
    (Evaluate, "evaluate vit --levels 2 --device cpu"),
    (Profile, f"profile {ONE} --device cpu"),
    (Plan, "plan --memory 1GiB --preset digits --family vit --batch 2"),
    (Doctor, "doctor"),
]
# values that no flag of a type can have, then values that some can
NONSENSE = {
    int: ["nan", "1.5", "x", "-3", str(2**31), str(2**63), str(10**30)],
    float: ["nan", "inf", "-inf", "x", "1e300"],
    str: ["[/]", "[bold]", ":smile:", "\x1b[31m", "\u202e", "no such thing", "a" * 5000],
    Path: ["", "file/below", "a" * 300],
    bool: ["maybe"],
}
ODD = {
    int: ["0", "1", "2", "7"],
    float: ["0", "-1", "1", "1e-300", "0.5", "1e-9", "1e5"],
    str: [
        "",
        ",",
        "1",
        "0,0",
        "latest",
        "file",
        "data.npz",
        "images",
        "z.npy",
        "vit",
        "rgb",
        "auto",
    ],
    Path: [".", "file", "data.npz", "folder", "folder.png", "[/].png", "vit", "x.npy", "/"],
    bool: [],
}
# nonsense as a number, but a flag for which it is none
SENSE = {("seed", str(2**31)), ("mean", "-3"), ("gamma", "1e300")}


@dataclass(frozen=True)
class Fuzz:
    """Fuzz the command line."""

    cases: int = 400
    """Commands that are run."""
    seed: int = 1
    """Seed of the commands."""


def flags(verb: type) -> Iterator[tuple[str, type]]:
    """Names of a verb's flags, and their types; a choice is a text."""
    hints = get_type_hints(verb)
    for field in fields(verb):
        kind = hints[field.name]
        if is_dataclass(kind):
            yield from flags(kind)
            continue
        if get_origin(kind) not in (None, tuple):
            kind = next((k for k in get_args(kind) if k in NONSENSE), str)
        if kind in NONSENSE:
            yield field.name, kind


def command(rng: random.Random) -> tuple[list[str], bool]:
    """A command, and whether it must fail."""
    verb, line = rng.choice(COMMANDS)
    words, nonsense = line.split(), False
    known = list(flags(verb))
    for name, kind in rng.sample(known, min(rng.randint(1, 3), len(known))):
        bad = rng.random() < 0.5 or not ODD[kind]
        value = rng.choice((NONSENSE if bad else ODD)[kind])
        words.append(f"--{name.replace('_', '-')}={value}")
        nonsense |= bad and (name, value) not in SENSE
    return words, nonsense


def fault(ended: Ended, nonsense: bool) -> str | None:
    """What is wrong with the end of a command."""
    if ended.code is None:
        return "hang"
    if "Traceback" in ended.err + ended.out:
        return "traceback"
    if ended.code not in (0, 1, 2):
        return f"exit {ended.code}"
    if ended.code == 0 and nonsense:
        return "success on nonsense"
    if ended.code == 1 and ended.err.count("error: ") != 1:
        return "no sentence"
    return None


def prepare(place: Path) -> None:
    """What the commands read: data, a run of each family, and things in the way."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    labels = np.arange(24) % 3
    np.savez(place / "data.npz", images=images, labels=labels, test_images=images[:9],
             test_labels=labels[:9])  # fmt: skip
    for family in ("vit", "dit"):
        words = f"train {family} --out {family} {SIZES}".split()
        ended = forked(lambda words=words: main(words), seconds=120)
        assert ended.code == 0, ended
    np.save(place / "z.npy", np.zeros((8, 4, 8, 8), np.float32))
    np.save(place / "z_labels.npy", labels[:8])
    # grey among colour, with brackets in its name, and what no reader takes
    for name, image in (("[b]cat/0.png", images[0, 0]), ("[/]dog/1.png", images[:3, 0])):
        (path := place / "images" / name).parent.mkdir(parents=True)
        Image.fromarray(image.transpose(1, 2, 0) if image.ndim == 3 else image).save(path)
    (place / "images/[/]dog/more.tiff").write_text("?")
    (place / "folder").mkdir()
    (place / "folder.png").mkdir()
    (place / "file").write_text("mine")


def fuzz(cases: int, seed: int) -> Counter[str]:
    """Run so many commands, print each that ends wrong, and count them."""
    rng, found = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)
        os.environ["COLUMNS"] = "100"
        prepare(Path(directory))
        for _ in range(cases):
            words, nonsense = command(rng)
            ended = forked(lambda words=words: main(words))
            if wrong := fault(ended, nonsense):
                found[wrong] += 1
                said = (ended.err.strip() or ended.out.strip()).splitlines()[-1:]
                print(f"{wrong}: {words}: {said}", flush=True)
            shutil.rmtree("out", ignore_errors=True)
        os.chdir("/")
    return found


def run(arguments: Sequence[str] | None = None) -> None:
    asked = tyro.cli(Fuzz, args=arguments)
    found = fuzz(asked.cases, asked.seed)
    print(f"{asked.cases} commands: {dict(found) or 'none ended wrong'}")
    sys.exit(bool(found))


if __name__ == "__main__":
    run()
