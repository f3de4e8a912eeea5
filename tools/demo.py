"""The demo: two models learn digits, end to end and in three blocks, on a CPU in a few minutes."""

import json
import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from machine import machine
from matplotlib.figure import Figure
from page import Section, html
from report_pictures import learning_section
from report_rows import Row
from report_tables import about, blocks_text, table_of
from rich.progress import Progress, TimeElapsedColumn
from show import rich_table
from torch import Tensor, nn

from dbkernels import DiffusionBlocks, DiT, Draw, LogNormal, Trainer, ViT, measure_peak, open_data
from dbkernels.cli.table import plain_console
from dbkernels.data.augment import drop_labels
from dbkernels.training.diffusion_blocks import load_weights
from dbkernels.training.evaluation import frechet_distance
from dbkernels.whole_file import write_whole

CLASSES, SHOWN = 10, 8  # digits of each class in the picture
POINTS = 50  # of a line of losses
LEVELS, GUIDANCE = 30, 1.5  # of the sampler
FEATURES = 32  # of the classifier that judges what is generated
JUDGE_STEPS, JUDGE_BATCH = 400, 128  # of its training
# below sigma = 0.3 the label can be read off the noisy target, and a block that trains there alone
# need not look at the image, so the ViT's noise is stronger than the published prior. End to end it
# has the most noise alone and is the ordinary classifier, which is harder to beat
NOISE = {
    ("vit", 1): LogNormal(mean=0.0, sigma_min=79.0),
    ("vit", 3): LogNormal(mean=0.0),
    ("dit", 1): LogNormal(),
    ("dit", 3): LogNormal(),
}
SHOWN_AS = "Unseen digits, after the same number of updates of every layer"
TITLE = "Training a network block by block, against end to end"
INTRODUCTION = """Training a deep network normally keeps what every layer computed in memory until
the backward pass has used it. DiffusionBlocks (arXiv:2506.14202) reads the network as a machine
that removes noise little by little, and gives each group of layers, a *block*, its own range of
noise. Each block is then trained alone, so a step keeps the activations of one block. Here a ViT
learns to classify and a DiT to generate 8 x 8 images of handwritten digits, each once end to end
and once in 3 blocks. A *step* trains one block; a *sweep* is a step of every block. Every layer
gets the same number of updates."""
HOW_TO_READ = """*Saved* is what the forward leaves for the backward. End to end has the same
fused layers. The ViT starts from pure noise and answers after each Euler
step; the last answer counts. The Fréchet distance compares generated digits with real ones in the
features of a small classifier; lower is better."""


@dataclass(frozen=True)
class Demo:
    """Train a ViT and a DiT on digits, end to end and in 3 blocks, and compare them."""

    out: Path = Path("runs/demo")
    """A folder of its own is made in here for the page and the numbers."""
    classifier_steps: int = 500
    """Updates of every layer of the ViT."""
    generator_steps: int = 1000
    """Updates of every layer of the DiT."""
    per_class: int = 100
    """Digits of each class that the DiT generates."""

    def run(self) -> None:
        begin, folder = time.time(), self.out / time.strftime("%Y%m%d-%H%M%S")
        setting = machine(torch.device("cpu")) | {"command": "bash tools/demo.sh"}
        setting |= {"suite": "demo", "preset": "digits"}
        (images, labels), (unseen, answers) = (everything(split) for split in ("train", "test"))
        judge = train_classifier(images, labels, seed=0)
        rows, shown = [], {"real": images[_in_rows(labels)]}
        with Progress(*Progress.get_default_columns(), TimeElapsedColumn()) as progress:
            for family, count in NOISE:
                blocks, row = self._train(family, count, progress)
                if family == "vit":
                    row |= classified(blocks)
                else:
                    # what was asked for, and digits that should be it
                    asked = torch.arange(CLASSES).repeat_interleave(self.per_class)
                    levels, draw = blocks.process.grid(LEVELS, "cdf"), Draw(0, step=0)
                    made = blocks.sample({"label": asked}, levels, draw, guidance=GUIDANCE)
                    row |= {"frechet": judge.distance(made, images)}
                    row |= {"recognised": judge.accuracy(made, asked)}
                    shown[row["name"]] = made[_in_rows(asked)]
                rows.append(setting | row)
        right = 100 * judge.accuracy(unseen, answers)
        note = f"The small classifier is right on {right:.1f} % of unseen digits, "
        note += f"which are at a Fréchet distance of {judge.distance(unseen, images):.3g}."
        folder.mkdir(parents=True)
        write_whole(folder / "demo.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_whole(folder / "report.html", html(TITLE, sections(rows, shown, note)))
        read_so = " ".join(HOW_TO_READ.split()).replace("*", "")
        plain_console().print(rich_table(transposed(rows), SHOWN_AS, f"{read_so} {note}"))
        print(f"report: {folder / 'report.html'}  ({time.time() - begin:.0f} s in all)")

    def _train(self, family: str, count: int, progress: Progress) -> tuple[DiffusionBlocks, Row]:
        """Train one model; what every row says of it."""
        torch.manual_seed(0)
        model = {"vit": ViT, "dit": DiT}[family].from_preset("digits")
        blocks = DiffusionBlocks(model, count, process=NOISE[family, count])
        is_vit = family == "vit"
        trainer = Trainer(
            blocks,
            open_data("digits"),
            steps=self.classifier_steps if is_vit else self.generator_steps,
            batch_size=128 if is_vit else 64,
            lr=2e-3,
            warmup=20,
            decay="cosine",
            ema=0.0 if is_vit else 0.99,
            augment=None if is_vit else partial(drop_labels, share=0.1, null=CLASSES),
        )
        name = blocks_text(count)
        task = progress.add_task(f"{family}, {name}", total=trainer.total_steps)
        losses: list[list[float]] = [[] for _ in blocks]
        seconds: list[list[float]] = [[] for _ in blocks]
        while trainer.step < trainer.total_steps:
            block, begin = trainer.next_block(), time.perf_counter()
            losses[block.index].append(trainer.step_block(block)["loss"])
            seconds[block.index].append(time.perf_counter() - begin)
            progress.advance(task)
        load_weights(blocks, trainer.tensors().get("ema", {}))
        each = [1e3 * statistics.median(times) for times in seconds]
        row = {"family": family, "num_blocks": count, "name": name}
        row |= {"updates": trainer.config.steps, "loss": [_means(line) for line in losses]}
        return blocks, row | memory(trainer) | {"step_ms": sum(each) / count, "sweep_ms": sum(each)}


class DigitClassifier(nn.Sequential):
    """8 x 8 images (B, 1, 8, 8) to logits (B, 10), through FEATURES numbers."""

    def __init__(self):
        first, second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 32, 3, stride=2, padding=1)
        features, head = nn.Linear(32 * 4 * 4, FEATURES), nn.Linear(FEATURES, CLASSES)
        super().__init__(
            first, nn.ReLU(), second, nn.ReLU(), nn.Flatten(), features, nn.ReLU(), head
        )

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images, in [0, 1], to which the classifier gives their label."""
        return float((self(images).argmax(-1) == labels).float().mean())

    @torch.no_grad()
    def distance(self, made: Tensor, images: Tensor) -> float:
        """Fréchet distance of some images to others, in the classifier's features."""
        features = nn.Sequential(*list(self)[:-2])
        return frechet_distance(features(made), features(images))


def train_classifier(images: Tensor, labels: Tensor, seed: int) -> DigitClassifier:
    """Train on real digits (N, 1, 8, 8), end to end; takes a few seconds."""
    random = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = DigitClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(JUDGE_STEPS):
        chosen = torch.randint(len(images), (JUDGE_BATCH,), generator=random)
        F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def everything(split: str) -> tuple[Tensor, Tensor]:
    """All digits of a split and their labels."""
    data = open_data("digits", split)
    batch = data.batch(torch.arange(len(data)))
    return batch["image"], batch["label"]


def memory(trainer: Trainer) -> Row:
    """Peak of the costliest block's step, and what its forward leaves; trains a step of each."""
    optimizers = [group.optimizer for group in trainer.groups.values()]
    about = {"model": trainer.blocks, "optimizers": optimizers}
    steps = [partial(trainer.step_block, block) for block in trainer.blocks]
    peaks = [measure_peak(step, **about) for step in steps]
    saved = max(peak.saved_bytes for peak in peaks)
    return {"peak_bytes": max(peak.total_bytes for peak in peaks), "saved_bytes": saved}


def classified(blocks: DiffusionBlocks) -> Row:
    """How well a classifier answers on digits that it has not seen."""
    found = blocks.evaluate(open_data("digits", "test"))
    accuracy = found.metrics["accuracy"]
    figures = {"accuracy": accuracy, "final_accuracy": accuracy[-1]}
    return figures | {"cross_entropy": found.loss_at_most_noise}


def sections(rows: list[Row], shown: dict[str, Tensor], note: str) -> list[Section]:
    """What the page says.

    Args:
        rows:   of the demo
        shown:  images to draw, a panel for each name
        note:   what is known of the judge
    """
    introduction, words = (" ".join(text.split()) for text in (INTRODUCTION, HOW_TO_READ))
    return [
        Section("What this is", introduction),
        Section(
            "What it saves and what it costs", words, transposed(rows), f"{note} {about(rows)}"
        ),
        learning_section(rows),
        Section("Generated digits beside real ones", DIGITS, picture=digits_picture(shown)),
    ]


DIGITS = "Each line asked for one digit. Look for strokes that join, and for variety in a line."


def transposed(rows: list[Row]) -> list[list[str]]:
    """A column for each model, a line for each figure."""
    (model, trained, *lines) = [list(line) for line in zip(*table_of(rows), strict=True)]
    heads = [f"{a}, {b}" for a, b in zip(model[1:], trained[1:], strict=True)]
    return [["", *heads], *lines]


def digits_picture(shown: dict[str, Tensor]) -> Figure:
    """Draw images (10 * SHOWN, 1, H, W), class after class, in a panel for each name."""
    figure = Figure((3.6 * len(shown), 4.2), layout="constrained")
    for axes, (name, images) in zip(figure.subplots(1, len(shown)), shown.items(), strict=True):
        grid = images[:, 0].unflatten(0, (CLASSES, -1))  # (10, SHOWN, H, W)
        axes.imshow(grid.permute(0, 2, 1, 3).flatten(2).flatten(0, 1), "gray", vmin=-1, vmax=1)
        axes.set_axis_off()
        axes.set_title(name)
    return figure


def _in_rows(labels: Tensor) -> Tensor:
    """The first SHOWN places of each class."""
    return torch.cat([(labels == k).nonzero()[:SHOWN, 0] for k in range(CLASSES)])


def _means(losses: list[float]) -> list[float]:
    """Means over runs of steps, few enough to store."""
    parts = torch.tensor(losses).split(-(-len(losses) // POINTS))
    return [float(f"{part.mean():.4g}") for part in parts]


if __name__ == "__main__":
    tyro.cli(Demo).run()
