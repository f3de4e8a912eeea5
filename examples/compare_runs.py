"""Train a classifier end to end and in blocks, and compare them: loss, accuracy, memory.

    python examples/compare_runs.py --steps 300 --out runs/compared

Both runs are what the command line's `train` makes: they can be resumed and evaluated there.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro
from matplotlib.figure import Figure

from dbkernels import LogNormal, TrainerConfig, ViT, measure_peak, open_data
from dbkernels.memory.units import in_words
from dbkernels.training.log import read_log
from dbkernels.training.run import load_run, train
from dbkernels.training.run_config import PartitionConfig, RunConfig


def main(steps: int = 300, num_blocks: int = 3, out: Path = Path("runs/compared")) -> None:
    """Train both and draw their losses.

    Args:
        steps: Updates of every layer, in either run.
        num_blocks: Of the run in blocks.
        out: Directory of both runs and of the picture.
    """
    trained = TrainerConfig(steps=steps, batch_size=64, lr=2e-3, warmup=20, decay="cosine")
    common = RunConfig(
        family="vit",
        model=ViT.preset("digits"),
        data="digits",
        weighting="none",
        label_drop=0.0,
        mirror=False,
        shift=0,
        partition=PartitionConfig(num_blocks=1),
        # a classifier need not tell small noise apart
        prior=LogNormal(sigma_min=0.4),
        trainer=trained,
    )
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    for count in (1, num_blocks):
        directory = out / f"{count}-blocks"
        config = replace(common, partition=replace(common.partition, num_blocks=count))
        trainer = train(config, directory, device="cpu", threads=torch.get_num_threads())
        step = partial(
            trainer.step_block, trainer.blocks[0]
        )  # one more, of the block of most noise
        needed = measure_peak(step, model=trainer.blocks).total_bytes
        _, blocks = load_run(directory, device="cpu")
        accuracy = blocks.evaluate(open_data("digits", "test")).metrics["accuracy"][-1]
        name = f"{count} block{'s' * (count > 1)}"
        print(f"{name}: accuracy {accuracy:.1%}, a step needs {in_words(needed)}")
        for block in range(count):
            rows = [row for row in read_log(directory / "log.jsonl") if row["block"] == block]
            updates, losses = zip(*((row["block_step"], row["loss"]) for row in rows), strict=True)
            axes.plot(updates, losses, label=f"{name}, block {block}")
    axes.set(xlabel="updates", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(out / "losses.png")
    print(f"wrote {out / 'losses.png'}")


if __name__ == "__main__":
    tyro.cli(main)
