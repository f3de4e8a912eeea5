"""Train a generator of digits by flow matching, in three blocks, and draw digits with it.

    python examples/flow.py --steps 500 --out digits.png

It takes a few minutes on a CPU.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import tyro
from PIL import Image

from dbkernels import DiffusionBlocks, DiT, Draw, Flow, Trainer, open_data
from dbkernels.data.augment import drop_conditions
from dbkernels.training.diffusion_blocks import load_weights

CLASSES, EACH = 10, 8


def main(steps: int = 500, out: Path = Path("digits.png")) -> None:
    """Train and draw.

    Args:
        steps: Updates of every block.
        out: A picture to write, a row for each digit.
    """
    torch.manual_seed(0)
    config = replace(DiT.preset("digits"), process="flow", prediction="velocity")
    # times of equal probability: each block has a third of those that training draws
    blocks = DiffusionBlocks(DiT(config), num_blocks=3, process=Flow(mean=0.0, std=1.0))
    for block in blocks:
        noise, layers = block.noise, block.layers
        print(f"layers {layers[0]} to {layers[-1]}: t from {noise.low:.3f} to {noise.high:.3f}")
    trainer = Trainer(
        blocks,
        open_data("digits"),
        steps=steps,
        batch_size=64,
        lr=2e-3,
        warmup=20,
        decay="cosine",
        ema=0.99,
        # a tenth of the labels is hidden, which guidance needs
        augment=partial(drop_conditions, share=0.1, unconditional=blocks.model.unconditional),
    )
    trainer.run()
    load_weights(blocks, trainer.tensors()["ema"])

    labels = torch.arange(CLASSES).repeat_interleave(EACH)
    levels = blocks.process.grid(20, "linear")
    draw = Draw(seed=0, step=0)
    images = blocks.sample({"label": labels}, levels, draw, guidance=1.5, sampler="dpmpp_2m")

    pixels = ((images[:, 0] + 1) * 127.5).clamp(0, 255).byte()  # (80, 8, 8)
    grid = pixels.unflatten(0, (CLASSES, EACH)).permute(0, 2, 1, 3).reshape(CLASSES * 8, EACH * 8)
    size = EACH * 64, CLASSES * 64
    Image.fromarray(grid.numpy()).resize(size, Image.Resampling.NEAREST).save(out)
    print(f"wrote {len(images)} digits: {out}")


if __name__ == "__main__":
    tyro.cli(main)
