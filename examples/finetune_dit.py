"""Fine-tune a published DiT on your own latents, and give it back to its own code.

    python examples/finetune_dit.py --weights DiT-XL-2-256x256.pt --data latents.npy

Trained whole, in one block, the network is written as the published code loads it. Cut into blocks
it needs the memory of one of them, learns from the whole network beside the data, and is no longer
one that runs all layers at every step: then it draws samples instead, block by block.
"""

import copy
import warnings
from pathlib import Path

import numpy as np
import torch
import tyro

from dbkernels import DiffusionBlocks, Draw, Trainer, open_data
from dbkernels.convert import load, save_as
from dbkernels.training.diffusion_blocks import load_weights
from dbkernels.training.trained import Distillation


def main(
    weights: Path = Path("DiT-XL-2-256x256.pt"),
    data: str = "latents.npy",
    num_heads: int | None = None,
    num_blocks: int = 1,
    steps: int = 1000,
    batch_size: int = 32,
    lr: float = 1e-5,
    out: Path = Path("finetuned"),
) -> None:
    """Train, and write what came of it.

    Args:
        weights: A file of the published code.
        data: Latents of the model's shape, with labels beside them.
        num_heads: Of a model that has no published size.
        num_blocks: 1 trains the whole network in every step.
        steps: Updates of every block.
        batch_size: Samples of an update.
        lr: Learning rate.
        out: To write, without a suffix: .pt in the published layout, or samples in .npy.
    """
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its variance comes back with the original below
        model = load(weights, num_heads=num_heads, recompute="qkv")
    taught = None
    if num_blocks > 1:
        teacher = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        taught = Distillation(teacher, share=0.5)
    # the steps of DDPM that it was trained with, each block with as many of them
    blocks = DiffusionBlocks(model, num_blocks)
    trainer = Trainer(
        blocks,
        open_data(data, num_classes=model.config.num_classes),
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        ema=0.999,
        offload="cpu" if num_blocks > 1 else "none",
        objective=taught,
        device=device,
    )
    trainer.run()
    load_weights(blocks, trainer.tensors()["ema"])
    if num_blocks == 1:
        path = out.with_suffix(".pt")
        save_as(model.cpu(), path, "dit", original=weights)
        print(f"wrote {path}, which the published code loads")
        return
    label = torch.arange(min(8, model.config.num_classes), device=blocks.device)
    samples = blocks.sample({"label": label}, blocks.process.grid(50, "cdf"), Draw(0, step=0))
    np.save(path := out.with_suffix(".npy"), samples.cpu().numpy())
    print(f"wrote {len(label)} samples of {num_blocks} blocks: {path}")


if __name__ == "__main__":
    tyro.cli(main)
