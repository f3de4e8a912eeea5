"""What `python -m dbkernels sample` does with a run of text."""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tyro.conf import UseAppendAction

from dbkernels.cli.printing import printing
from dbkernels.cli.progress import ProgressBar
from dbkernels.data.tokenizer import FILE, Tokenizer, encoded, tokenizer_of
from dbkernels.diffusion.bridges import BridgeName
from dbkernels.diffusion.process import Spacing
from dbkernels.memory.units import in_words
from dbkernels.models.text import TextConfig
from dbkernels.ops.philox import Draw
from dbkernels.settings import MOST_SAMPLES, check_number
from dbkernels.training.diffusion_blocks import DiffusionBlocks
from dbkernels.training.generated_text import GeneratedText, check_prompt, text_levels
from dbkernels.training.run_config import RunConfig
from dbkernels.whole_file import whole_file

LENGTH = 256  # tokens, where nobody says another number
MOST_TOKENS = 2**24  # of a text
RULE = "-" * 40  # between texts


@dataclass(frozen=True)
class WritingFlags:
    """Of text."""

    prompt: UseAppendAction[tuple[str, ...]] = ()
    """What a text begins with. May come again, for other texts; without one they begin anew."""
    prompt_file: Path | None = None
    """A file of UTF-8 that is a prompt as a whole, to its last line end."""
    samples: int | None = None
    """Texts of each prompt; one unless told otherwise."""
    length: int | None = None
    """Tokens after the prompt, where a text does not end before; 256 unless told otherwise."""
    temperature: float | None = None
    """Below 1 likely tokens come more often. It acts where a token's noise says nothing yet, at its
    first level; where tokens are unmasked, at each."""
    top_p: float | None = None
    """Only the likeliest tokens that have so much probability between them, at the same levels."""
    bridge: BridgeName | None = None
    """How a token goes from level to level: towards one that is drawn (sample, unless told
    otherwise), to what is expected (soft), or to the likeliest (argmax)."""
    stop: float | None = None
    """Least level of a token; by default that of training. From about 0.15 down its noise hides
    nothing, and levels are spent for nothing."""
    time: bool = False
    """Tell tokens per second and the bytes of the cache, on stderr."""

    def check(self, out: Path | None) -> None:
        """Refuse what no run can do."""
        if out is not None and out.suffix != ".txt":
            raise ValueError(f"out must end in .txt for text, got {out}")
        for name, most in (("samples", MOST_SAMPLES), ("length", MOST_TOKENS)):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, 1, most)

    def prompts(self) -> list[str]:
        """All of them; one that is empty where none is given."""
        found = list(self.prompt)
        for text in found:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"prompt must be UTF-8, got a byte that is not at character {error.start}"
                ) from None
        if self.prompt_file is not None:
            content = self.prompt_file.read_bytes()
            try:
                found.append(content.decode())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{self.prompt_file} must be UTF-8, got byte {content[error.start]:#x} at "
                    f"{error.start}"
                ) from None
        return found or [""]


@dataclass
class _Meter:
    """Tokens that were drawn, the seconds that it took, and bytes that were kept of known ones."""

    tokens: int = 0
    seconds: float = 0.0
    cache_bytes: int = 0

    def __str__(self) -> str:
        rate = f"{self.tokens / max(self.seconds, 1e-9):.4g} tokens/s"
        cache = f"{self.cache_bytes} bytes, {in_words(self.cache_bytes)}"
        return (
            f"{self.tokens} tokens in {self.seconds:.3g} s: {rate}; cache: "
            f"{cache if self.cache_bytes else 'none'}"
        )


class _Growing:
    """A text while its tokens come; after its end no more is taken."""

    def __init__(self, tokenizer: Tokenizer):
        self._decoder, self._end = tokenizer.decoder(), tokenizer.end_of_text
        self.ended = False
        self.tokens = 0

    def more(self, ids: Sequence[int]) -> str:
        """What these tokens add."""
        if self.ended:
            return ""
        if self._end in ids:
            ids, self.ended = ids[: ids.index(self._end)], True
        self.tokens += len(ids) + self.ended
        return self._decoder.more(ids)

    def rest(self) -> str:
        """What the last tokens leave."""
        return self._decoder.rest()


def sample_text(
    directory: Path,
    config: RunConfig,
    blocks: DiffusionBlocks,
    flags: WritingFlags,
    out: Path | None,
    *,
    batch: int,
    levels: int | None,
    grid: Spacing | Literal["auto"],
    seed: int,
) -> None:
    """Draw the texts of each prompt, and print or write them.

    Args:
        directory:       of the run
        config, blocks:  of it
        flags:           that were checked
        out:             .txt; None prints
        batch:           texts that are drawn at a time
        levels:          how many; None is the run's own number
        grid:            their spacing; auto is cdf
        seed:            of all that is drawn
    """
    tokenizer, model = _tokenizer(directory, config), text_model(config)
    prompts = [_tokens(tokenizer, text) for text in flags.prompts()]
    for prompt in prompts:
        check_prompt(prompt, model.length, model.vocabulary)
    settings: dict[str, Any] = _settings(config, blocks, flags, levels, grid)
    samples, length = flags.samples or 1, flags.length or LENGTH
    total, meter = len(prompts) * samples, _Meter()

    def grown(prompt: Tensor, first: int, count: int) -> Iterator[list[str]]:
        """What comes to each of some texts, step by step; their prompt first."""
        rows = prompt.to(blocks.device).expand(count, -1)
        text = GeneratedText(blocks, rows, length, Draw(seed, step=0, sample=first), **settings)
        return _grown(text, tokenizer, meter)

    def texts(shown: ProgressBar) -> Iterator[str]:
        for index, prompt in enumerate(prompts):
            for start in range(0, samples, batch):
                count, first = min(batch, samples - start), index * samples + start
                pieces = []
                for step, more in enumerate(grown(prompt, first, count)):
                    pieces.append(more)
                    shown.step(first * length + min(step, length) * count)
                yield from map("".join, zip(*pieces, strict=True))

    if out is None and total == 1:
        with printing() as write:
            for (more,) in grown(prompts[0], 0, 1):
                write(more)
    else:
        with ProgressBar("sampling", total * length, "tokens") as shown:
            _write(out, texts(shown), total)
    if flags.time:
        print(meter, file=sys.stderr)


def _grown(text: GeneratedText, tokenizer: Tokenizer, meter: _Meter) -> Iterator[list[str]]:
    rows = [_Growing(tokenizer) for _ in text.prompt]
    yield [row.more(ids) for row, ids in zip(rows, text.prompt.tolist(), strict=True)]
    before, began = sum(row.tokens for row in rows), time.perf_counter()
    for tokens in text:
        yield [row.more(ids) for row, ids in zip(rows, tokens.tolist(), strict=True)]
        if all(row.ended for row in rows):
            break
    meter.seconds += time.perf_counter() - began
    meter.tokens += sum(row.tokens for row in rows) - before
    meter.cache_bytes = max(meter.cache_bytes, text.cache_bytes)
    yield [row.rest() for row in rows]


def _settings(
    config: RunConfig,
    blocks: DiffusionBlocks,
    flags: WritingFlags,
    levels: int | None,
    grid: Spacing | Literal["auto"],
) -> dict[str, object]:
    """What `GeneratedText` is told."""
    names = ("bridge", "temperature", "top_p")
    told = {name: getattr(flags, name) for name in names}
    if config.objective == "conventional":
        given = {"levels": levels, "grid": None if grid == "auto" else grid, "stop": flags.stop}
        for name, value in given.items():
            if value is not None:
                raise ValueError(
                    f"{name} must not be given for a run that was trained without noise, got "
                    f"{value}"
                )
        return {**told, "conventional": True}
    spacing = "cdf" if grid == "auto" else grid
    return {**told, "levels": text_levels(blocks, levels, spacing=spacing, stop=flags.stop)}


def text_model(config: RunConfig) -> TextConfig:
    """The sizes of a run's model, which is of text."""
    assert isinstance(config.model, TextConfig)
    return config.model


def _tokenizer(directory: Path, config: RunConfig) -> Tokenizer:
    """That of the run, or else of its data."""
    place = directory if (directory / FILE).is_file() else Path(config.data)
    found = tokenizer_of(place)
    vocabulary = text_model(config).vocabulary
    if found.vocabulary != vocabulary:
        raise ValueError(
            f"the tokenizer in {place} must have the model's vocabulary, "
            f"{vocabulary} ids, got {found.vocabulary}"
        )
    return found


def _tokens(tokenizer: Tokenizer, text: str) -> Tensor:
    """(1, P) int64 of a prompt."""
    # what follows a letter goes on with its word, unless something stands between
    ids = encoded(tokenizer, text, goes_on=bool(text) and not text[-1].isalnum())
    if text and not len(ids):
        raise ValueError(
            f"prompt must have something that the tokenizer {tokenizer.name} can read, got "
            f"{text!r:.50}"
        )
    return torch.from_numpy(ids)[None]


def _write(out: Path | None, texts: Iterator[str], total: int) -> None:
    """Write texts with rules between, or print them."""
    if out is None:
        for place, text in enumerate(texts):
            with printing() as write:
                write(f"{RULE}\n{text}" if place else text)
        return
    with whole_file(out) as file:
        for place, text in enumerate(texts):
            file.write((f"{RULE}\n{text}\n" if place else f"{text}\n").encode(errors="replace"))
    print(f"wrote {total} text{'s' * (total > 1)}: {out}")
