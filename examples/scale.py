"""What a residual transformer of 100 billion parameters needs on many GPUs, on paper.

    python examples/scale.py --gpus 1024 --memory 80GiB

A DiT of any size is searched for meshes that fit: end to end, with its parameters shared out by
FSDP2 and its layers cut by tensor parallelism, and in blocks, which send each other nothing. All of
it is predicted; no model is made, and no GPU is needed.
"""

from collections.abc import Callable
from dataclasses import replace

import tyro

from dbkernels.memory.units import bytes_from, in_words
from dbkernels.models import DiT
from dbkernels.planning.meshes import search_meshes
from dbkernels.planning.recipe import Recipe
from dbkernels.planning.search import Estimate, context_bytes


def main(
    gpus: int = 1024,
    memory: str = "80GiB",
    dim: int = 12288,
    depth: int = 40,
    num_heads: int = 96,
    per_gpu: int = 8,
    say: Callable[[str], None] = print,
) -> None:
    """Print the fastest plan of each number of blocks.

    Args:
        gpus:       that train the model
        memory:     of each
        dim:        width of the model
        depth:      its layers
        num_heads:  its attention heads
        per_gpu:    samples of a step for each GPU
        say:        called with each line
    """
    sizes = {"dim": dim, "depth": depth, "num_heads": num_heads}
    model = replace(DiT.preset("XL/2"), **sizes)
    parameters = 18 * depth * dim**2
    recipe = Recipe("dit", "", model, batch_size=per_gpu * gpus, autocast=True)
    say(f"{parameters / 1e9:,.1f}e9 parameters in layers, {per_gpu * gpus} samples a step")
    answer = search_meshes(recipe, gpus, bytes_from(memory))
    if not answer.plans:
        needed = answer.smallest.peak_bytes + context_bytes(recipe.device)
        raise SystemExit(f"nothing fits {memory}: the smallest plan needs {in_words(needed)}")
    say("blocks  at once  batch  layer  recompute     micro-batch  peak      time")
    for plan in answer.plans:
        say(_line(plan, answer.whole))


def _line(plan: Estimate, whole: Estimate) -> str:
    recipe = plan.recipe
    return (
        f"{recipe.num_blocks:6}  {plan.side_by_side:7}  {recipe.data_parallel:5}  "
        f"{recipe.tensor_parallel:5}  {recipe.recompute:12}  {recipe.micro_batch:11}  "
        f"{in_words(plan.peak_bytes):8}  {plan.seconds / whole.seconds:.2f}"
    )


if __name__ == "__main__":
    tyro.cli(main)
