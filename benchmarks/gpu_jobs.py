"""What `tools/gpu.sh` runs: the minutes of a GPU in the order of their worth, part by part.

`python benchmarks/gpu_jobs.py [--rehearse] [PART ...]` prints a line for each job: its part, the
file of what it prints, the seconds that it may take, and its command. A rehearsal runs the same
programs with the same options on a CPU; only `Sizes` differ.
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rehearsal import PRESET

ROOT = Path(__file__).parents[1]
LIMITS = {"smoke": 90, "headline": 240, "kernels": 90, "rest": 60}  # seconds, in the order of worth
POLICIES = ("none", "qkv", "layer")
MARK = "pytest.mark.gpu"


@dataclass(frozen=True)
class Sizes:
    """All that a rehearsal has otherwise."""

    tests: tuple[str, ...]  # more options of pytest
    headline: tuple[str, ...]  # presets of DiT
    graphs: tuple[str, ...]
    profiled: str
    batch: int
    num_blocks: tuple[int, ...]
    rounds: int  # of training, two for each block
    launch: tuple[str, ...]  # a CPU has no graphs
    widths: tuple[int, ...]
    op_rounds: int
    more_of_ops: tuple[str, ...]
    more: tuple[str, ...]  # options of every benchmark
    more_of_training: tuple[str, ...]
    patience: int = 1  # limits of time, of those on a GPU


GPU = Sizes(
    tests=("-n", "8"),  # of 16 cores: most of their time compiles kernels
    headline=("XL/2", "L/2"),
    graphs=("S/2", "B/2"),
    profiled="S/2",
    batch=64,
    num_blocks=(1, 2, 3, 4, 6),
    rounds=12,
    launch=("ops", "graph"),
    widths=(1152, 384, 768, 1536),
    op_rounds=20,
    more_of_ops=(),
    more=(),
    more_of_training=(),
)
REHEARSAL = Sizes(
    tests=("-n", "0", "--rehearse"),
    headline=(PRESET,),
    graphs=(PRESET,),
    profiled="digits",
    batch=2,
    num_blocks=(1, 3),
    rounds=6,
    launch=("ops",),
    widths=(64,),
    op_rounds=2,
    more_of_ops=("--samples", "2"),
    more=("--device", "cpu", "--threads", "1"),
    more_of_training=("--rehearse",),
    patience=10,
)


@dataclass(frozen=True)
class Job:
    """One program of a part."""

    part: str
    file: str  # of what it prints; *.jsonl are rows that tools/report.py reads
    seconds: int  # that it may take
    command: tuple[str, ...]  # after the name of python


def jobs(sizes: Sizes) -> list[Job]:
    """All jobs, in the order of their worth.

    Args:
        sizes:  GPU or REHEARSAL
    """
    counts = [str(count) for count in sizes.num_blocks]
    build = ("setup.py", "build_ext", "--inplace")
    # a name comes as soon as its test has failed, and is kept where the rest is cut off
    tests = ("-m", "pytest", "-p", "xdist.plugin", "-v", "--tb=short", "-m", "gpu")
    tests += (*sizes.tests, *marked())
    training = ("benchmarks/training.py", "--json", "--family", "dit", "--dtype", "autocast")
    training += (
        "--batch",
        str(sizes.batch),
        "--rounds",
        str(sizes.rounds),
        "--optimizer-in-backward",
        "False",
    )
    training += (*sizes.more, *sizes.more_of_training)
    methods = ("--methods", "end_to_end", "checkpointed", "block_fused", "compiled")
    headline = (*training, "--preset", *sizes.headline, *methods, "--num-blocks", *counts)
    headline += (
        "--recompute",
        *POLICIES,
        "--budgets",
        "1",
        "--nearest",
        "none",
        "--offload",
        "none",
    )
    headline += ("cpu", "--offload-at", "3", "--beside", "--early")
    ops = ("benchmarks/ops.py", "--json", "--impls", "fused", "eager", "--stream", "same")
    ops += ("float32", "--beside", "--rounds", str(sizes.op_rounds), *sizes.more)
    ops += ("--dim", *map(str, sizes.widths), *sizes.more_of_ops)
    graphs = (*training, "--preset", *sizes.graphs, "--methods", "end_to_end", "block_fused")
    graphs += ("--num-blocks", "3", "--recompute", "none", "--offload", "none")
    graphs += ("--launch", *sizes.launch)
    profile = ("-m", "dbkernels", "profile", "--json", "--measure", "--family", "dit", "--preset")
    profile += (sizes.profiled, "--batch", str(sizes.batch), "--autocast", "--num-blocks", "3")
    profile += ("--methods", "block_fused", "--recompute", "none", "--offload", "none")
    return [
        Job("smoke", "build.txt", 40, build),
        Job("smoke", "tests.txt", 50, tests),
        Job("headline", "headline.jsonl", 240, headline),
        Job("kernels", "kernels.jsonl", 90, ops),
        Job("rest", "graphs.jsonl", 35, graphs),
        Job("rest", "profile.ndjson", 25, profile),
    ]


def marked() -> list[str]:
    """Files of tests that need a GPU: to collect all others takes longer than to run these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if MARK in f.read_text()]


def main(words: Sequence[str]) -> None:
    """Print the jobs of some parts, or of all.

    Args:
        words:  of the command line
    Raises:
        SystemExit: a word names no part.
    """
    rehearse = "--rehearse" in words
    parts = [word for word in words if word != "--rehearse"] or list(LIMITS)
    for part in parts:
        if part not in LIMITS:
            raise SystemExit(f"a part must be one of {', '.join(LIMITS)}, got {part}")
    sizes = REHEARSAL if rehearse else GPU
    for job in jobs(sizes):
        if job.part in parts:
            seconds = sizes.patience * job.seconds
            print(job.part, job.file, seconds, shlex.join(job.command), sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
