"""The models of text of the demo: what is trained on Shakespeare, and what is told of each.

A masked model and an autoregressive one, end to end and in blocks. End to end the autoregressive
one has no noise and is the ordinary language model; the masked one is one block of all layers.
"""

import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import shakespeare
import torch
from demo_train import Told, followed, memory
from report_rows import Row
from torch import Tensor

from dbkernels import AR, MDM, DiffusionBlocks, Draw, GeneratedText, Trainer, open_tokens
from dbkernels.data.tokenizer import tokenizer_of
from dbkernels.models.registry import family_named

MODELS = {"mdm": MDM, "ar": AR}
SIZES = {"dim": 64, "depth": 6, "num_heads": 4, "length": 64}
BATCH, RATE, WARMUP = 16, 2e-3, 50
WINDOWS, CHARACTERS = 128, 280  # that are read for the bits, and that each model writes
FITTED = {"mean": -0.55, "std": 0.8, "sigma_max": 8.0}  # to where a character's information lies
TEXT_SEED = 1  # of what is written


@dataclass(frozen=True)
class TextJob:
    """A model of text to train and what to ask of it then.

    family:     mdm, or ar
    num_blocks: 1 trains end to end
    steps:      updates of every layer
    data:       directory of tokens, three plays of them held out
    """

    family: str
    num_blocks: int
    steps: int
    data: Path

    @property
    def updates(self) -> int:
        """Updates of all layers."""
        return self.steps * SIZES["depth"]

    @property
    def conventional(self) -> bool:
        """Whether it is trained without noise."""
        return self.num_blocks == 1 and bool(family_named(self.family).conventional)

    def run(self, told: Told) -> tuple[Row, Tensor | None]:
        """Train, evaluate and write; the model's row, and no digits."""
        torch.set_num_threads(1)
        blocks = self._blocks()
        settings = {"batch_size": BATCH, "lr": RATE, "warmup": WARMUP, "decay": "cosine"}
        if self.conventional:
            settings["objective"] = DiffusionBlocks.conventional_loss
        data = open_tokens(self.data, length=SIZES["length"])
        trainer = Trainer(blocks, data, steps=self.steps, seed=0, **settings)
        row = {"family": self.family, "num_blocks": self.num_blocks, "updates": self.steps}
        begin = time.perf_counter()
        row |= followed(trainer, told) | {"training_s": time.perf_counter() - begin}
        row |= memory(trainer)
        blocks.eval()
        return row | self._bits(blocks) | self._written(blocks), None

    def _blocks(self) -> DiffusionBlocks:
        torch.manual_seed(0)
        model, process, order = MODELS[self.family], family_named(self.family).process, "first"
        config = model.preset("small").resized(SIZES)
        if self.family == "ar" and not self.conventional:
            process, order = replace(process, **FITTED), "deepest"
            config = replace(config, clean="through", noisy_input="z_and_clean")
        return DiffusionBlocks(model(config), self.num_blocks, process=process, noise_order=order)

    def _bits(self, blocks: DiffusionBlocks) -> Row:
        """Bits per character of plays that the model has not read."""
        unseen = open_tokens(self.data, "test", length=SIZES["length"])
        if self.conventional:
            found = blocks.evaluate_conventional(unseen, samples=WINDOWS)
        else:
            # a masked text has no sampler to leave out
            starts = None if blocks.text == "masked" else 0
            found = blocks.evaluate(unseen, starts=starts, samples=WINDOWS)
        row: Row = {"bits": found.bits, "blocks": list(found.blocks), "windows": found.windows}
        row["curves"] = [asdict(curve) for curve in found.curves]
        masked = blocks.text == "masked"
        row["shares"] = [[b.noise.high, b.noise.low] for b in blocks] if masked else []
        return row

    def _written(self, blocks: DiffusionBlocks) -> Row:
        """What the model writes from nothing, and as many characters of the plays."""
        tokenizer, nothing = tokenizer_of(self.data), torch.empty(1, 0, dtype=torch.int64)
        text = GeneratedText(
            blocks, nothing, CHARACTERS, Draw(TEXT_SEED, step=0), conventional=self.conventional
        )
        unseen = open_tokens(self.data, "test", length=CHARACTERS)
        real = unseen.batch(torch.tensor([len(unseen) // 2]))["token"][0]
        return {
            "text": tokenizer.decode(torch.cat(list(text), 1)[0]),
            "held_out": tokenizer.decode(real),
        }


def text_jobs(steps: int, data: Path) -> list[TextJob]:
    """The longest first."""
    return [TextJob(family, count, steps, data) for family in ("ar", "mdm") for count in (3, 1)]


def text_data(place: Path) -> str:
    """Write Shakespeare's works as tokens; why they cannot be had, or nothing where they can."""
    try:
        shakespeare.write(shakespeare.archive(shakespeare.CACHE), place)
    except shakespeare.Unavailable as error:
        return f"The part on Shakespeare is left out: {error}."
    return ""
