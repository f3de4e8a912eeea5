"""Train on a Dataset of your own, read by workers, and go on where the run was interrupted.

    python examples/own_dataset.py --workers 2

The samples are pictures of circles and crosses, which the Dataset draws when it is asked for one.
The same command again goes on from the last checkpoint; another number of workers gives the same
bits.
"""

from pathlib import Path

import torch
import tyro
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from dbkernels import DiffusionBlocks, Trainer, ViT, as_data
from dbkernels.training import checkpoint

SIDE, LARGE = 8, 64
KEYS = ("image", "label")


class Shapes(Dataset):
    """Pairs (image, label): a circle or a cross, whose place and size its index decides."""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        label = index % 2
        random = torch.Generator().manual_seed(self.seed + index)
        x, y, r = (torch.rand(3, generator=random) * torch.tensor([20, 20, 8]) + 18).tolist()
        image = Image.new("L", (LARGE, LARGE))
        draw = ImageDraw.Draw(image)
        if label:
            draw.ellipse((x - r, y - r, x + r, y + r), outline=255, width=8)
        else:
            draw.line((x - r, y - r, x + r, y + r), fill=255, width=8)
            draw.line((x - r, y + r, x + r, y - r), fill=255, width=8)
        pixels = image.resize((SIDE, SIDE), Image.Resampling.BOX).tobytes()
        values = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(1, SIDE, SIDE)
        return values / 127.5 - 1, label  # the range that a model expects


def main(
    steps: int = 100, workers: int = 0, save_every: int = 60, out: Path = Path("shapes")
) -> None:
    """Train, and say how many unseen shapes are known.

    Args:
        steps: Updates of every block.
        workers: Processes that draw the samples of coming steps.
        save_every: Steps between checkpoints.
        out: Directory of the checkpoints.
    """
    torch.manual_seed(0)
    blocks = DiffusionBlocks(ViT.from_preset("digits"), num_blocks=3)
    settings = {"batch_size": 64, "lr": 2e-3, "warmup": 10}
    data = Shapes(2000, seed=0)
    trainer = Trainer(blocks, data, keys=KEYS, steps=steps, workers=workers, **settings)
    if checkpoint.latest(out) is not None:
        _, tensors, state = checkpoint.load_latest(out)
        trainer.restore(tensors, state["counters"])
        print(f"goes on from step {trainer.step} of {trainer.total_steps}")
    while trainer.step < trainer.total_steps:
        trainer.step_block(trainer.next_block())
        if trainer.step % save_every == 0 or trainer.step == trainer.total_steps:
            state = {"counters": trainer.counters()}
            checkpoint.save(out, trainer.step, trainer.tensors(), state, read=trainer.read)
    trainer.close()
    print(blocks.evaluate(as_data(Shapes(200, seed=10**6), keys=KEYS)))


if __name__ == "__main__":
    tyro.cli(main)
