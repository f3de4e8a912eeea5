from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dbkernels.training.diffusion_blocks import DiffusionBlocks


@pytest.fixture
def sample(cli, runs):
    """The numbers that a run of a dit gives."""

    def run(line, flags=""):
        done = cli(f"sample {runs(line)} --out x.npy --per-class 2 --levels 5 --device cpu {flags}")
        assert done.code == 0, done
        return np.load("x.npy", allow_pickle=False)

    return run


def test_writes_a_picture_with_a_row_for_each_class(cli, runs):
    outcome = cli(f"sample {runs('dit')} --per-class 2 --levels 3 --device cpu")
    assert (outcome.code, outcome.out) == (0, "wrote 6 images: samples.png\n")
    image = Image.open("samples.png")
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (2 * 64, 3 * 64))


def test_writes_numbers_that_the_seed_decides(sample):
    a, b, c = (sample("dit", f"--seed {seed}") for seed in (0, 0, 1))
    assert a.shape == (6, 1, 8, 8) and a.dtype == np.float32
    assert np.isfinite(a).all()
    assert np.array_equal(a, b) and not np.array_equal(a, c)


DROPPED = "dit --lr 0.1 --label-drop 0.5"


@pytest.mark.parametrize(
    ("line", "flags", "same"),
    [
        (DROPPED, "--sampler heun", False),
        (DROPPED, "--grid karras", False),
        (DROPPED, "--grid cdf", True),
        (DROPPED, "--guidance 7", False),
        # there is guidance where labels were dropped
        (DROPPED, "--guidance 2", True),
        ("dit --lr 0.1", "--guidance 1", True),
    ],
)
def test_every_setting_changes_the_images_but_the_default_of_guidance(sample, line, flags, same):
    assert np.array_equal(sample(line), sample(line, flags)) == same


def test_heun_has_the_levels_that_it_needs_unless_told_otherwise(sample):
    own, karras, cdf = (
        sample(DROPPED, f"--sampler heun {grid}") for grid in ("", "--grid karras", "--grid cdf")
    )
    assert np.array_equal(own, karras) and not np.array_equal(own, cdf)


def test_a_picture_has_a_row_for_each_class_and_numbers_are_as_they_are(cli, runs, monkeypatch):
    def show(images, out, per_class):
        def sample(blocks, batch, *arguments, **settings):
            asked.append(batch["label"].tolist())
            return images

        monkeypatch.setattr(DiffusionBlocks, "sample", sample)
        assert cli(f"sample {runs('dit')} --out {out} --per-class {per_class}").code == 0
        return np.load(out) if out.endswith("npy") else np.asarray(Image.open(out))

    asked = []
    values = torch.tensor([-1.0, 0.0, 1.0, 9.0])[:, None, None, None]
    pixels = show(values.expand(4, 1, 2, 2), "x.png", 2)
    assert pixels.shape == (2 * 64, 2 * 64, 3) and asked == [[0, 0, 1, 1, 2, 2]]
    assert pixels[::127, ::127, 0].tolist() == [[0, 128], [255, 255]]
    # three channels of a latent, and large images as they are
    latent = torch.stack([torch.full((80, 80), v) for v in (-1.0, 1.0, -1.0, 1.0)])[None]
    pixels = show(latent, "x.png", 1)
    assert pixels.shape == (80, 80, 3) and pixels[0, 0].tolist() == [0, 255, 0]
    images = torch.randn(2, 4, 3, 3) * 5
    assert np.array_equal(show(images, "x.npy", 1), images.numpy())
    assert {p.name for p in Path().iterdir()} == {"data.npz", "x.npy", "x.png"}
