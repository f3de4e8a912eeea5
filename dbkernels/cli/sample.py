"""`python -m dbkernels sample`."""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional

from dbkernels.cli.device import pick_device
from dbkernels.cli.sample_images import ImageFlags, sample_images
from dbkernels.cli.sample_text import WritingFlags, sample_text
from dbkernels.diffusion.process import Spacing
from dbkernels.models.registry import family_named
from dbkernels.settings import MOST_SAMPLES, MOST_SEED, check_number
from dbkernels.training.run import load_run
from dbkernels.training.run_config import read_config


@dataclass(frozen=True)
class Sample:
    """Generate images or text with a trained model."""

    run_dir: Positional[Path]
    """Directory of a run."""
    out: Path | None = None
    """Images: a .png grid, one row per class or prompt, or an .npy of all (N, C, H, W), which
    latents need; samples.png unless told otherwise. Text: a .txt; else it is printed as it is
    drawn."""
    batch: int = 64
    """Samples held in memory at a time; images are rounded up to 16, and no bit of them changes."""
    levels: int | None = None
    """Noise levels. Images: 50, each one evaluation of the network, or two with heun. Text: as many
    as blocks, each one evaluation of a token; masked tokens open at one for each of a window."""
    grid: Spacing | Literal["auto"] = "auto"
    """Spacing of the levels; auto is cdf, whose steps visit every block about equally often, but
    for samplers that need close levels: then linear for a flow, else karras. cosine is for masked
    tokens alone: few open at first."""
    weights: Literal["average", "last"] = "average"
    """The moving average of the weights where the run kept one, or the last weights."""
    checkpoint: str = "latest"
    """latest, or the path of a checkpoint of the run."""
    seed: int = 0
    """Seed of the starting noise, and of all that is drawn."""
    device: str = "auto"
    """auto, cpu or cuda; auto is an NVIDIA GPU where there is one."""
    images: ImageFlags = field(default_factory=ImageFlags)
    text: WritingFlags = field(default_factory=WritingFlags)

    def run(self) -> None:
        check_number("batch", self.batch, 1, MOST_SAMPLES)
        check_number("seed", self.seed, 0, MOST_SEED)
        entry = family_named(family := read_config(self.run_dir).family)
        if entry.prompts is None and entry.writes is None:
            raise ValueError(f"sample needs a run that generates, got one of {family}")
        _require_none_of(self.images if entry.writes else self.text, family)
        out = self.out if self.out or entry.writes else Path("samples.png")
        if entry.writes:
            self.text.check(out)
        elif out is not None:
            self.images.check(out)
        if out is not None:
            _check_place(out)
        averaged = self.weights == "average"
        device = pick_device(self.device)
        run = load_run(self.run_dir, which=self.checkpoint, averaged=averaged, device=device)
        names = ("batch", "levels", "grid", "seed")
        given: dict[str, Any] = {name: getattr(self, name) for name in names}
        if entry.writes:
            sample_text(self.run_dir, *run, self.text, out, **given)
        elif out is not None:
            sample_images(*run, self.images, out, **given)


def _require_none_of(flags: ImageFlags | WritingFlags, family: str) -> None:
    for each in fields(flags):
        if (value := getattr(flags, each.name)) != each.default:
            raise ValueError(f"{each.name} must not be given for a run of {family}, got {value}")


def _check_place(out: Path) -> None:
    if not out.parent.is_dir():
        raise ValueError(f"out must lie in a directory that exists, got {out}")
    if out.is_dir():
        raise ValueError(f"out must be a file, got the directory {out}")
