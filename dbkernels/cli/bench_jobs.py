"""What `python -m dbkernels bench` runs: the benchmarks of a checkout, each as a command."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

LARGE = ("S/2", "B/2", "L/2", "XL/2")
AFTER_BACKWARD = ("--optimizer-in-backward", "False")
FEW = ("--num-blocks", "1", "3", "--recompute", "none", "qkv", "--budgets", "1.0", *AFTER_BACKWARD)
PREDICTED = ("--num-blocks", "1", "3", "6", "--recompute", "none", "qkv", "layer_narrow")
PREDICTED += ("--budgets", "1.0", "0.5", *AFTER_BACKWARD)
# of the published code's ViT: what its own way of training keeps, and what this project's does
PUBLISHED = (
    "--num-blocks",
    "3",
    "--recompute",
    "none",
    "qkv",
    "--rounds",
    "6",
    *AFTER_BACKWARD,
    "--methods",
)
PUBLISHED += ("end_to_end", "block_stock", "block_fused")
# a step as one CUDA graph beside the same step op by op
GRAPHS = (
    "--num-blocks",
    "3",
    "--recompute",
    "none",
    "--offload",
    "none",
    "--launch",
    "ops",
    "graph",
)
GRAPHS += ("--rounds", "12", *AFTER_BACKWARD, "--methods", "end_to_end", "block_fused")


@dataclass(frozen=True)
class Job:
    """One program and its arguments."""

    name: str  # of the file of its rows, without the suffix
    program: str  # in benchmarks/
    arguments: tuple[str, ...]
    seconds: int  # about how long it takes, by which the time that is left is told


def jobs(*, full: bool, on_gpu: bool) -> list[Job]:
    """All that one call runs, in order.

    Args:
        full:    every method, policy and number of blocks, and not what few minutes allow
        on_gpu:  whether models of a GPU's size run, or are predicted
    """
    found = [*(_full(on_gpu) if full else _quick_gpu() if on_gpu else _quick_cpu())]
    kind = "full" if full else "quick"
    return [Job(f"{kind}-{job.name}", job.program, job.arguments, job.seconds) for job in found]


def _full(on_gpu: bool) -> Iterator[Job]:
    yield Job("timeline", "timeline.py", (), 30)
    yield Job("ops", "ops.py", (), 120)
    yield Job("layer", "layer.py", (), 240 if on_gpu else 60)
    yield _training("vit", "cifar100", (), 300 if on_gpu else 1800)
    if not on_gpu:
        yield _training("vit", "digits", (), 200)
        yield _training("dit", "digits", (), 200)
    for number, name in enumerate(LARGE, 1):
        yield _training("dit", name, (), 600 * number if on_gpu else 120 * number)
        if on_gpu:
            yield _graphs(name)


def _quick_cpu() -> Iterator[Job]:
    yield _training("vit", "cifar100", PUBLISHED, 105)
    yield _training("vit", "digits", (*FEW, "--rounds", "15"), 45)
    yield _training("dit", "digits", (*FEW, "--rounds", "15"), 40)
    for name, seconds in zip(LARGE, (15, 15, 20, 20), strict=True):
        yield _training("dit", name, PREDICTED, seconds)
    yield Job("timeline", "timeline.py", (), 20)
    yield Job("layer", "layer.py", (), 35)
    yield Job("ops", "ops.py", ("--rounds", "5"), 90)


def _quick_gpu() -> Iterator[Job]:
    yield _training("dit", "S/2", (*FEW, "--rounds", "12"), 150)
    # apart from the others, which it does not take along should it fail
    yield _graphs("S/2")
    for name in LARGE[1:]:
        yield _training("dit", name, (*PREDICTED, "--target", "this"), 20)
    yield Job("timeline", "timeline.py", (), 20)
    yield Job("layer", "layer.py", (), 140)
    yield Job("ops", "ops.py", ("--rounds", "5"), 50)


def _graphs(preset: str) -> Job:
    job = _training("dit", preset, GRAPHS, 60)
    return replace(job, name=f"{job.name}-graphs")


def _training(family: str, preset: str, arguments: tuple[str, ...], seconds: int) -> Job:
    name = f"training-{family}-{preset.replace('/', '')}"
    case = ("--family", family, "--preset", preset, *arguments)
    return Job(name, "training.py", case, seconds)
