"""How long `tools/gpu.sh` will take on an H100 with 16 cores: an estimate, not a measurement.

`python benchmarks/gpu_time.py [PART ...]` prints the seconds of each part. Kernels, ways, rounds
and operations are counted from the jobs; what one of each takes is stated below.
"""

import sys
from collections.abc import Mapping, Sequence

from gpu_jobs import GPU, LIMITS, POLICIES
from layer_case import LayerCase
from noise_case import PASSES, SHAPES
from op_case import INPUTS, STREAM
from training_prepare import BUDGETS

from dbkernels.models.dit import PRESETS

# stated, in seconds
START = 10.0  # of a process: imports, and a CUDA context
NVCC = 20.0  # for one file of csrc on one architecture; there is a core for each
TRITON = 1.0  # to compile one kernel; at most 0.7 of a core were seen
INDUCTOR = 35.0  # to compile a layer, forward and backward, in one thread
PREDICTION = 6.0  # of a step of 28 layers on fake tensors
COLLECT = 0.3  # of the garbage collector, before memory is measured
MAKE = 0.3  # a trainer of parameters that another has
FOLLOWED = 0.012  # that the tracker adds to a layer, forward and backward
WARM_UP = 0.1  # of a competitor, as benchmarks/measure.py has it
OP = 1e-3  # an op in plain torch, with all copies of its inputs
TEST = 0.4  # but for the kernels that it compiles
# stated, per second
FLOPS = 3.0e14  # of a whole step: under half of what matmuls alone reach
COPY = 2.5e12  # bytes
PINNED = 2.0e9  # bytes of pinned memory that are had and filled
PCIE = 2.0e10  # bytes between host and device
# stated, of how much is to be done
TESTS, TEST_KERNELS = 120, 180
LAYER_KERNELS = 14  # of Triton in one policy, forward and backward
AGAIN = {"none": 1.0, "qkv": 1.19, "layer": 1.33}  # operations of a step, of those without a policy
ADAM = 28  # bytes that an update moves for a parameter
STATE = 12  # bytes of a parameter and its moments
PARAMETERS = 18  # of a layer, in D**2, with its modulation
TEST_PROCESSES = 8
COMPILERS = 14  # processes that compile and predict at once


def seconds() -> Mapping[str, float]:
    """Of each part."""
    return {"smoke": _smoke(), "headline": _headline(), "kernels": _kernels(), "rest": _rest()}


def _smoke() -> float:
    build = START / 2 + NVCC
    tests = (TESTS * TEST + TEST_KERNELS * TRITON) / TEST_PROCESSES
    return build + 1.5 * START + tests


def _headline() -> float:
    predicted = len(GPU.num_blocks) * len(POLICIES) + 2 + len(BUDGETS)
    waves = -(-predicted * len(GPU.headline) // COMPILERS)
    # the first ways are weighed, and the nearest budget is known, while the last is compiled
    ready = START + waves * PREDICTION
    compiled = max(INDUCTOR, LAYER_KERNELS * TRITON)
    first, *others = (_preset(name) for name in GPU.headline)
    weighing, timing = first
    return START + ready + max(weighing, compiled) + timing + sum(map(sum, others))


def _preset(name: str) -> tuple[float, float]:
    """Of weighing all ways of a preset, and of timing them."""
    step, depth = _step(name), PRESETS[name].depth
    alike = [(1, share) for share in (1.0, 1.33, 1.0, 1.0)]  # eager, checkpointed, compiled twice
    alike += [(count, AGAIN[recompute]) for count in GPU.num_blocks for recompute in POLICIES]
    weighing = timing = 0.0
    for count, share in alike:
        one = share * step / count
        followed = one + FOLLOWED * depth / count
        weighing += MAKE + 2 * COLLECT + count * one + 3 * one + followed
        timing += WARM_UP + (2 + GPU.rounds) * one
    resident_bytes = STATE * _parameters(name)
    swap = 2 * resident_bytes / 3 / PCIE
    weighing += resident_bytes / PINNED
    for recompute in POLICIES:
        one = AGAIN[recompute] * step / 3 + swap
        weighing += 2 * COLLECT + 7 * one
        timing += WARM_UP + (2 + GPU.rounds + 3) * one
    return weighing, timing


def _step(name: str) -> float:
    """Of one step end to end, with its update."""
    model = PRESETS[name]
    D = model.dim
    tokens = (model.image_size // model.patch) ** 2
    layer = LayerCase(GPU.batch, tokens, D, model.num_heads, model.mlp_ratio * D, "bfloat16")
    return model.depth * layer.flops / FLOPS + ADAM * _parameters(name) / COPY


def _parameters(name: str) -> float:
    model = PRESETS[name]
    return PARAMETERS * model.depth * model.dim**2


def _kernels() -> float:
    of_a_width = len(INPUTS) + len(STREAM)
    kernels = 2 * of_a_width * len(GPU.widths)
    noise = len(PASSES) * len(SHAPES)
    compiled = START + (kernels + noise) * TRITON / COMPILERS
    timed = kernels + noise
    competitors = 3  # fused, eager and a copy
    one = competitors * (WARM_UP + GPU.op_rounds * OP) + 2 * COLLECT / 2
    return START + compiled + timed * one


def _rest() -> float:
    graphs = START + LAYER_KERNELS * TRITON / 2
    for name in GPU.graphs:
        step = _step(name)
        graphs += 3 * (MAKE + 2 * COLLECT + WARM_UP) + (12 + 3 * GPU.rounds) * step
    profile = 2 * START + PREDICTION / 2
    return graphs + profile


def main(words: Sequence[str]) -> None:
    """Print the seconds of some parts, or of all.

    Args:
        words:  names of parts
    """
    found = {part: time for part, time in seconds().items() if part in (words or LIMITS)}
    for part, time in found.items():
        print(f"{part}: about {time:.0f} s of {LIMITS[part]} s on an H100 (estimated)")
    print(f"together: about {sum(found.values()) / 60:.1f} minutes")


if __name__ == "__main__":
    main(sys.argv[1:])
