"""What `tools/gpu.sh` runs: the minutes of a GPU in the order of their worth, part by part.

`python benchmarks/gpu_jobs.py [--rehearse] [PART ...]` prints a line for each job: its part, the
file of what it prints, the seconds that it may take, and its command. A rehearsal runs the same
programs with the same options on a CPU; only `Sizes` differ. With `--estimate` it prints instead
how long the parts will take on an H100 with 16 cores: an estimate, not a measurement.
"""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from attention_case import ATTENTIONS
from layer_case import LayerCase
from op_case import INPUTS, PASSES, SHAPES, STREAM
from rehearsal import PRESET
from training_memory import BUDGETS

from dbkernels.models.ar import PRESETS as AR_PRESETS
from dbkernels.models.dit import PRESETS

ROOT = Path(__file__).parents[1]
# seconds, in the order of worth
LIMITS = {"smoke": 85, "headline": 235, "kernels": 100, "rest": 60}
POLICIES = ("none", "qkv", "layer")
MARK = "pytest.mark.gpu"


@dataclass(frozen=True)
class Sizes:
    """All that a rehearsal has otherwise."""

    tests: str = "-n 8"  # more options of pytest; of 16 cores: most of their time compiles kernels
    headline: tuple[str, ...] = ("XL/2",)  # presets of DiT
    text: str = "paper"  # preset of the autoregressive family
    text_blocks: int = 4
    graphs: tuple[str, ...] = ("S/2", "B/2")
    profiled: str = "S/2"
    batch: int = 64
    num_blocks: tuple[int, ...] = (1, 2, 3, 4, 6)
    rounds: int = 12  # of training, two for each block
    launch: str = "ops graph"  # a CPU has no graphs
    widths: tuple[int, ...] = (1152, 384, 768, 1536)
    op_rounds: int = 20
    more_of_ops: str = ""
    more: str = ""  # options of every benchmark
    more_of_training: str = ""
    patience: int = 1  # limits of time, of those on a GPU


GPU = Sizes()
REHEARSAL = Sizes(
    tests="-n 0 --rehearse",
    headline=(PRESET,),
    text="small",
    text_blocks=3,
    graphs=(PRESET,),
    profiled="digits",
    batch=2,
    num_blocks=(1, 3),
    rounds=6,
    launch="ops",
    widths=(64,),
    op_rounds=2,
    more_of_ops="--samples 2",
    more="--device cpu --threads 1",
    more_of_training="--rehearse",
    patience=10,
)


@dataclass(frozen=True)
class Job:
    """One program of a part."""

    part: str
    file: str  # of what it prints; *.jsonl are rows that tools/report.py reads
    seconds: int  # that it may take
    command: str  # after the name of python


def jobs(sizes: Sizes) -> list[Job]:
    """All jobs, in the order of their worth.

    Args:
        sizes:  GPU or REHEARSAL
    """
    # a name comes as soon as its test has failed, and is kept where the rest is cut off
    tests = f"-m pytest -p xdist.plugin -v --tb=short -m gpu {sizes.tests} {words(marked())}"
    training = (
        "benchmarks/training.py --json --dtype autocast "
        f"--batch {sizes.batch} --rounds {sizes.rounds} --optimizer-in-backward False "
        f"{sizes.more} {sizes.more_of_training}"
    )
    headline = (
        f"{training} --family dit --preset {words(sizes.headline)} "
        f"--num-blocks {words(sizes.num_blocks)} "
        "--methods end_to_end checkpointed block_fused compiled "
        f"--recompute {words(POLICIES)} --budgets 1 --nearest none --offload none cpu "
        "--offload-at 3 --beside --early"
    )
    # the ordinary language model, and a model in blocks of the same layers
    text = (
        f"{training} --family ar --preset {sizes.text} --num-blocks {sizes.text_blocks} "
        "--methods end_to_end checkpointed block_fused compiled --recompute none --budgets 1 "
        "--offload none --beside --early"
    )
    ops = (
        "benchmarks/ops.py --json --impls fused eager --stream same float32 --beside "
        f"--rounds {sizes.op_rounds} --dim {words(sizes.widths)} {sizes.more} {sizes.more_of_ops}"
    )
    graphs = (
        f"{training} --family dit --preset {words(sizes.graphs)} --methods end_to_end block_fused "
        f"--num-blocks 3 --recompute none --offload none --launch {sizes.launch}"
    )
    profile = (
        f"-m dbkernels profile --json --measure --family dit --preset {sizes.profiled} "
        f"--batch {sizes.batch} --autocast --num-blocks 3 --methods block_fused "
        "--recompute none --offload none"
    )
    return [
        Job("smoke", "build.txt", 40, "setup.py build_ext --inplace"),
        Job("smoke", "tests.txt", 45, tests),
        Job("headline", "headline.jsonl", 165, headline),
        Job("headline", "text.jsonl", 70, text),
        Job("kernels", "kernels.jsonl", 100, ops),
        Job("rest", "graphs.jsonl", 35, graphs),
        Job("rest", "profile.ndjson", 25, profile),
    ]


def words(values: Sequence[object]) -> str:
    return shlex.join(map(str, values))


def marked() -> list[str]:
    """Files of tests that need a GPU: to collect all others takes longer than to run these."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(f.relative_to(ROOT)) for f in files if MARK in f.read_text()]


# how long it takes: what is to be done is counted from the jobs, what one of it takes is stated

START = 10.0  # seconds of a process: imports, and a CUDA context
NVCC = 20.0  # seconds for one file of csrc on one architecture; there is a core for each
TESTS = 28.0  # seconds of the tests and of the kernels that they compile, in 8 processes
TRITON = 1.0  # seconds to compile one kernel; at most 0.7 of a core were seen
INDUCTOR = 35.0  # seconds to compile a layer, forward and backward, in one thread
PREDICTION = 6.0  # seconds of a step of 28 layers on fake tensors
WEIGH = 1.2  # seconds to make a trainer, collect garbage and follow a step, beside its steps
WARM_UP = 0.1  # seconds of a competitor, as benchmarks/measure.py has it
OP = 1e-3  # seconds of an op in plain torch, with all copies of its inputs
FLOPS = 3.0e14  # per second, of a whole step: under half of what matmuls alone reach
HOST = 2.0e9  # bytes per second of pinned memory that are had and filled
STATE = 12  # bytes of a parameter and its moments
AGAIN = {"none": 1.0, "qkv": 1.19, "layer": 1.33}  # operations of a step, of those without a policy
COMPILERS = 14  # processes that compile and predict at once


def seconds() -> Mapping[str, float]:
    """Of each part."""
    predicted = len(GPU.headline) * (len(GPU.num_blocks) * len(POLICIES) + 2 + len(BUDGETS))
    ready = -(-predicted // COMPILERS) * PREDICTION
    of_a_width = 2 * (len(INPUTS) + len(STREAM) + len(ATTENTIONS))
    kernels = of_a_width * len(GPU.widths) + len(PASSES) * len(SHAPES)
    competitors = 3  # fused, eager and a copy; each is also weighed
    timed = competitors * (2 * WARM_UP + GPU.op_rounds * OP)
    graphs = sum(3 * (WEIGH + (5 + GPU.rounds) * _step(name)[0]) for name in GPU.graphs)
    return {
        "smoke": 2 * START + NVCC + TESTS,
        # the first ways are weighed while the last is compiled
        "headline": 2 * START + ready + INDUCTOR + sum(map(_preset, GPU.headline)) + _text(),
        "kernels": 2 * START + kernels * (TRITON / COMPILERS + timed),
        "rest": 3 * START + PREDICTION / 2 + 7 * TRITON + graphs,
    }


def _preset(name: str) -> float:
    """Of weighing and timing all ways of a preset."""
    step, parameters = _step(name)
    alike = [1.0, 1.33, 1.0, 1.0]  # eager, checkpointed, compiled twice
    # and those of one block of three on the device
    alike += [AGAIN[policy] / count for count in (*GPU.num_blocks, 3) for policy in POLICIES]
    ways = sum(WEIGH + WARM_UP + (9 + GPU.rounds) * share * step for share in alike)
    return ways + STATE * parameters / HOST


def _text() -> float:
    """Of the job of the language model, whose ways are four."""
    model, cuts = AR_PRESETS[GPU.text], GPU.text_blocks
    S, D, hidden = model.length, model.dim, model.mlp_hidden
    layer = LayerCase(GPU.batch, S, D, model.num_heads, 3 * hidden // 2, "bfloat16")
    layers, head = model.depth * layer.flops, 6 * model.vocabulary * D * GPU.batch * S
    # eager, checkpointed, compiled, and a block, which has its layers twice and a head of its own
    steps = [layers + head, 1.33 * layers + head, layers + head, 2 * layers / cuts + head]
    ways = sum(WEIGH + WARM_UP + (9 + GPU.rounds) * flops / FLOPS for flops in steps)
    return 2 * START + PREDICTION + INDUCTOR + ways


def _step(name: str) -> tuple[float, float]:
    """Of one step end to end; and the model's parameters."""
    model = PRESETS[name]
    D, tokens = model.dim, (model.image_size // model.patch) ** 2
    layer = LayerCase(GPU.batch, tokens, D, model.num_heads, model.mlp_ratio * D, "bfloat16")
    return model.depth * layer.flops / FLOPS, 18 * model.depth * D**2


def main(arguments: Sequence[str]) -> None:
    """Print the jobs, or an estimate of their time, of some parts or of all.

    Args:
        arguments:  of the command line
    Raises:
        SystemExit: a word names no part.
    """
    parts = [word for word in arguments if word not in ("--rehearse", "--estimate")] or list(LIMITS)
    for part in parts:
        if part not in LIMITS:
            raise SystemExit(f"a part must be one of {', '.join(LIMITS)}, got {part}")
    if "--estimate" in arguments:
        times = seconds()
        for part in parts:
            print(f"{part}: about {times[part]:.0f} s of {LIMITS[part]} s on an H100 (estimated)")
        print(f"together: about {sum(times[part] for part in parts) / 60:.1f} minutes")
        return
    sizes = REHEARSAL if "--rehearse" in arguments else GPU
    for job in jobs(sizes):
        if job.part in parts:
            print(job.part, job.file, sizes.patience * job.seconds, job.command, sep="\t")


if __name__ == "__main__":
    main(sys.argv[1:])
