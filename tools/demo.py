"""The demo: two models learn digits and two text, whole and in blocks, on a CPU in minutes."""

import json
import multiprocessing
import tempfile
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from demo_text import TextJob, text_data, text_jobs
from demo_train import CLASSES, Job
from judge import judge_of
from machine import machine
from matplotlib.figure import Figure
from page import Section, html
from report_names import about, blocks_text
from report_pictures import learning_section
from report_rows import Row
from report_tables import table_of
from report_text import information_section, texts_in_lines, texts_section
from seeds import over_seeds
from show import rich_table
from torch import Tensor

from dbkernels import open_data
from dbkernels.cli.progress import ProgressBar
from dbkernels.cli.table import plain_console
from dbkernels.pool import processes
from dbkernels.whole_file import write_whole

SHOWN = 8  # digits of each class in the picture
PROCESSES = 2  # more would not fit the machines that this is for
Models = dict[Job | TextJob, tuple[Row, Tensor | None]]  # a row and digits of each
ACCURACIES = ("accuracy", "accuracy_from_noise")  # after each step
SHOWN_AS = "Unseen digits, after the same number of updates of every layer"
TITLE = "Training a network block by block, against end to end"
INTRODUCTION = """Training a deep network normally keeps what every layer computed in memory until
the backward pass has used it. DiffusionBlocks (arXiv:2506.14202) reads the network as a machine
that removes noise little by little, and gives each group of layers, a *block*, its own range of
noise. Each block is then trained alone, so a step keeps the activations of one block. Here a ViT
learns to classify and a DiT to generate 8 x 8 images of handwritten digits, and two models, MDM and
AR, learn to write Shakespeare's text, end to end and in 3 blocks. A *step* trains one block; a
*sweep* is a step of every block. Every layer gets the same number of updates; what all blocks
share, the first and the last maps, gets one from each block."""
HOW_TO_READ = """*Saved* is what the forward leaves for the backward. End to end has the same fused
layers, and its ViT sees the most noise alone, which makes it the ordinary classifier. A ViT answers
after each Euler step, from z = 0; the last answer counts. *From noise* is the paper's way. ± is the
standard deviation over seeds. The Fréchet distance compares generated digits with real ones in the
features of a small classifier; lower is better."""
TEXT_SHOWN_AS = "Plays that no model has read, after the same number of updates"
HOW_TO_READ_TEXT = """Every figure is bits per character of three plays that no model has read;
lower is better. How often each symbol comes, and nothing else, gives about 4.08. MDM fills the gaps
of a text whose characters are masked, AR writes one character after the other. End to end, AR is
the ordinary language model without noise, whose bits are exact; the others are bounds, and no model
is worse than its bound. Compare 3 blocks with the same model end to end beside them, which had the
same updates of every layer. The bits of each block are those of its own noise, the most noise
first."""


@dataclass(frozen=True)
class Demo:
    """Train two models on digits and two on Shakespeare, end to end and in 3 blocks."""

    out: Path = Path("runs/demo")
    """A folder of its own is made in here for the page and the numbers."""
    classifier_steps: int = 400
    """Updates of every layer of the ViT."""
    generator_steps: int = 1000
    """Updates of every layer of the DiT."""
    seeds: int = 3
    """Trainings of the ViT, whose accuracies are averaged."""
    per_class: int = 100
    """Digits of each class that the DiT generates."""
    text_steps: int = 600
    """Updates of every layer of the models of text."""

    def run(self) -> None:
        begin, folder = time.time(), self.out / time.strftime("%Y%m%d-%H%M%S")
        setting = machine(torch.device("cpu")) | {"command": "bash tools/demo.sh"}
        setting |= {"suite": "demo", "threads": 1}
        with tempfile.TemporaryDirectory() as place:
            missing = text_data(Path(place))
            texts = [] if missing else text_jobs(self.text_steps, Path(place))
            found = trained([*self._generators(), *texts, *self._classifiers()])
        rows, shown, note = self._of_digits(found, setting | {"preset": "digits"})
        of_text = [setting | {"preset": "shakespeare"} | found[job][0] for job in texts[::-1]]
        folder.mkdir(parents=True)
        every = "".join(json.dumps(row) + "\n" for row in rows + of_text)
        write_whole(folder / "demo.jsonl", every)
        page = [*sections(rows, shown, note), *text_sections(of_text, missing)]
        write_whole(folder / "report.html", html(TITLE, page))
        console = plain_console()
        read_so = " ".join(HOW_TO_READ.split()).replace("*", "")
        console.print(rich_table(transposed(rows), SHOWN_AS, f"{read_so} {note}"))
        if of_text:
            read_so = " ".join(HOW_TO_READ_TEXT.split())
            console.print(rich_table(transposed(of_text), TEXT_SHOWN_AS, read_so))
        print(texts_in_lines(of_text) or textwrap.fill(missing, console.width))
        print(f"report: {folder / 'report.html'}  ({time.time() - begin:.0f} s in all)")

    def _of_digits(self, found: Models, setting: Row) -> tuple[list[Row], dict[str, Tensor], str]:
        """Rows of the models of digits, digits to draw, and what is known of their judge."""
        (images, labels), (unseen, answers) = (everything(split) for split in ("train", "test"))
        judge = judge_of("digits")
        rows, shown = [], {"real": images[_in_rows(labels)]}
        asked = torch.arange(CLASSES).repeat_interleave(self.per_class)
        for family in ("vit", "dit"):
            for count in (1, 3):
                alike = [job for job in found if (job.family, job.num_blocks) == (family, count)]
                row = setting | over_seeds([found[job][0] for job in alike], ACCURACIES)
                if family == "vit":
                    row["final_accuracy"] = row["accuracy"][-1]
                else:
                    [(_, made)] = [found[job] for job in alike]
                    row |= {"frechet": judge.distance(made)}
                    row |= {"recognised": judge.accuracy(made, asked)}
                    shown[blocks_text(count)] = made[_in_rows(asked)]
                rows.append(row)
        right = 100 * judge.accuracy(unseen, answers)
        note = f"The small classifier is right on {right:.1f} % of unseen digits, "
        note += f"which are at a Fréchet distance of {judge.distance(unseen):.3g}."
        return rows, shown, note

    def _generators(self) -> list[Job]:
        return [Job("dit", count, 0, self.generator_steps, self.per_class) for count in (3, 1)]

    def _classifiers(self) -> list[Job]:
        seeds, steps = range(self.seeds), self.classifier_steps
        return [Job("vit", count, seed, steps, 0) for seed in seeds for count in (3, 1)]


def trained(jobs: Sequence[Job | TextJob]) -> Models:
    """What each job finds; two run at a time, the first ones first.

    Args:
        jobs:  the longest first, so that no process waits long for the last one
    """
    total, done = sum(job.updates for job in jobs), 0
    with (
        multiprocessing.get_context("spawn").Manager() as manager,
        processes(PROCESSES) as pool,
        ProgressBar("training", total, "updates of layers") as shown,
    ):
        told = manager.Queue()
        running = {job: pool.submit(job.run, told.put) for job in jobs}
        for job in running.values():
            job.add_done_callback(lambda _: told.put(0))
        while not all(job.done() for job in running.values()):
            done += told.get()
            ended = sum(job.done() for job in running.values())
            shown.step(done, f"{ended} of {len(jobs)} models are trained")
        return {job: future.result() for job, future in running.items()}


def everything(split: str) -> tuple[Tensor, Tensor]:
    """All digits of a split and their labels."""
    data = open_data("digits", split)
    batch = data.batch(torch.arange(len(data)))
    return batch["image"], batch["label"]


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


def text_sections(rows: list[Row], missing: str) -> list[Section]:
    """What the page says of the models of text.

    Args:
        rows:     of the demo
        missing:  why there are none
    """
    title, words = "What it costs a model of text", " ".join(HOW_TO_READ_TEXT.split())
    if not rows:
        return [Section(title, missing)]
    table = Section(title, words, transposed(rows), about(rows))
    return [table, *texts_section(rows), learning_section(rows), information_section(rows)]


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


if __name__ == "__main__":
    tyro.cli(Demo).run()
