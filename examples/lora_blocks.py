"""Train adapters of a digits network in two blocks, each on a machine of its own, and merge them.

    python examples/lora_blocks.py --steps 200 --out adapters

A small network is trained first, in the place of one that somebody published. It takes a few
minutes on a CPU. `adapters` is then a folder that peft loads into diffusers' DiTTransformer2DModel.
"""

from dataclasses import replace
from pathlib import Path

import torch
import tyro

from dbkernels import DiffusionBlocks, DiT, Trainer, open_data
from dbkernels.convert import load_adapters, merge_adapter_files, save_adapters
from dbkernels.models import add_adapters, merge_adapters
from dbkernels.models.adapter import adapters_in

SETTINGS = {"batch_size": 64, "warmup": 5, "decay": "cosine"}


def main(steps: int = 200, rank: int = 4, out: Path = Path("adapters")) -> None:
    """Train a base, then adapters for its mirrored digits.

    Args:
        steps: Updates of every block, of the base and of its adapters.
        rank: Of the adapters.
        out: A folder to write.
    """
    torch.manual_seed(0)
    base = DiT(replace(DiT.preset("digits"), process="vp", prediction="epsilon"))
    data = open_data("digits")
    Trainer(DiffusionBlocks(base, 2), data, steps=steps, lr=2e-3, **SETTINGS).run()
    trained = {name: tensor.clone() for name, tensor in base.state_dict().items()}

    files = []
    for index in range(2):  # on any days, on any machines
        model = DiT(base.config)
        model.load_state_dict(trained)
        add_adapters(model, rank=rank, targets=("q", "k", "v", "out", "fc1", "fc2"))
        blocks = DiffusionBlocks(model, 2)
        task = {"augment": mirrored, "lr": 5e-3, "steps": steps}
        trainer = Trainer(blocks, data, **task, **SETTINGS)
        row = {}
        for _ in range(steps):
            row = trainer.step_block(blocks[index])
        small = sum(p.numel() for p in model.parameters() if p.requires_grad)
        whole = sum(p.numel() for p in model.parameters())
        print(f"block {index}: loss {row['loss']:.3f}, trained {small} of {whole} numbers")
        files.append(out.with_name(f"{out.name}-block{index}"))
        save_adapters(model, files[-1], "peft", layers=blocks[index].layers)

    merge_adapter_files(files, out)
    model = DiT(base.config)
    model.load_state_dict(trained)
    load_adapters(model, out)
    count = len(list(adapters_in(model)))
    merge_adapters(model)
    print(f"wrote {out}: {count} adapters of rank {rank}, and merged them into the weights")


def mirrored(batch, draw):
    """What the adapters learn: digits left to right."""
    return {**batch, "image": batch["image"].flip(-1)}


if __name__ == "__main__":
    tyro.cli(main)
