"""Train on a GPU with little memory: find the fastest plan that fits it, and train by the plan.

    python examples/small_gpu.py --memory 600MiB --steps 100

Nothing is measured to find it, so it works for a GPU that is not there, as here: without one the
plan is for an H100 of that memory, and a CPU follows it.
"""

from dataclasses import replace

import torch
import tyro

from dbkernels import DiffusionBlocks, DiT, Trainer, open_data
from dbkernels.memory.allocator import target_named, target_of
from dbkernels.memory.units import bytes_from, in_words
from dbkernels.planning.recipe import of_preset
from dbkernels.planning.search import context_bytes, search


def main(memory: str = "600MiB", batch: int = 64, steps: int = 100) -> None:
    """Plan and train.

    Args:
        memory: Of the GPU, such as 12GiB.
        batch: Samples of a step.
        steps: Updates of every block.
    """
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda" if has_gpu else "cpu")
    target = target_of(device) if has_gpu else target_named("h100")
    recipe = replace(of_preset("dit", "digits"), batch_size=batch, device=target)
    answer = search(recipe, bytes_from(memory))
    if not answer.plans:
        needed = in_words(answer.smallest.peak_bytes + context_bytes(target))
        raise SystemExit(f"nothing fits {memory}: the smallest plan needs {needed}")
    plan = answer.plans[0]
    best = plan.recipe
    needed = in_words(answer.whole.peak_bytes)
    print(f"end to end needs {needed}, the plan {in_words(plan.peak_bytes)}:")
    print(f"{best.num_blocks} blocks, recompute {best.recompute}, offload {best.offload}")

    torch.manual_seed(0)
    config = replace(DiT.preset("digits"), recompute=best.recompute)
    blocks = DiffusionBlocks(DiT(config), best.num_blocks)
    if best.offload == "none":
        blocks = blocks.to(device)
    trainer = Trainer(
        blocks,
        open_data("digits"),
        steps=steps,
        batch_size=batch,
        accumulate=best.accumulate,
        offload=best.offload,
        # as many steps of a block in a row as keep swaps a small share of the time
        steps_per_swap=0 if best.offload != "none" else 1,
        device=device,
    )
    trainer.run()
    print(blocks.evaluate(open_data("digits", "test")))


if __name__ == "__main__":
    tyro.cli(main)
