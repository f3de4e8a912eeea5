from pathlib import Path

import numpy as np
import pytest
import torch
from cli.runs import refused
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
        (DROPPED, "--sampler dpmpp_2m", False),
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


@pytest.mark.parametrize(
    ("noise", "sampler", "close"),
    [
        ("", "heun", "karras"),
        (" --process flow", "dpmpp_2m", "linear"),
        (" --process vp --prediction v", "heun", "karras"),
    ],
)
def test_a_sampler_has_the_levels_that_it_needs_unless_told_otherwise(
    sample, noise, sampler, close
):
    own, near, cdf = (
        sample(DROPPED + noise, f"--sampler {sampler} {grid}")
        for grid in ("", f"--grid {close}", "--grid cdf")
    )
    assert np.array_equal(own, near) and not np.array_equal(own, cdf)
    assert np.isfinite(own).all()


@pytest.fixture
def shown(cli, runs, monkeypatch):
    """Gives some images in place of a model's; what was written of them."""

    def show(images, out, flags):
        def sample(blocks, batch, levels, draw, **settings):
            found = torch.arange(draw.sample, draw.sample + len(batch["label"]))
            asked.append(dict(zip(found.tolist(), batch["label"].tolist(), strict=True)))
            written.append(sum(p.stat().st_size for p in Path().iterdir() if out in p.name))
            return images[found.clamp(max=len(images) - 1)]

        monkeypatch.setattr(DiffusionBlocks, "sample", sample)
        assert cli(f"sample {runs('dit')} --out {out} {flags}").code == 0
        return np.load(out) if out.endswith("npy") else np.asarray(Image.open(out))

    asked, written = [], []
    show.asked, show.written = asked, written
    return show


def test_a_picture_has_a_row_for_each_class_and_numbers_are_as_they_are(shown):
    values = torch.tensor([-1.0, 0.0, 1.0, 9.0, 0.0, 0.0])[:, None, None, None]
    pixels = shown(values.expand(6, 1, 2, 2), "x.png", "--per-class 2")
    assert pixels.shape == (3 * 64, 2 * 64, 3)
    assert [shown.asked[0][i] for i in range(6)] == [0, 0, 1, 1, 2, 2]
    assert pixels[:128:127, ::127, 0].tolist() == [[0, 128], [255, 255]]
    # large images as they are
    colours = torch.stack([torch.full((80, 80), v) for v in (-1.0, 1.0, -1.0)])[None]
    pixels = shown(colours, "x.png", "--per-class 1")
    assert pixels.shape == (3 * 80, 80, 3) and pixels[0, 0].tolist() == [0, 255, 0]
    images = torch.randn(6, 4, 3, 3) * 5
    assert np.array_equal(shown(images, "x.npy", "--per-class 2"), images.numpy())
    assert {p.name for p in Path().iterdir()} == {"data.npz", "x.npy", "x.png"}


def test_images_are_written_batch_by_batch(shown):
    images = torch.randn(99, 1, 8, 8)
    assert np.array_equal(shown(images, "x.npy", "--per-class 33 --batch 20"), images.numpy())
    # two pieces of 16 are a batch, and then they are in the file
    assert len(shown.asked) == 7 and {len(each) for each in shown.asked} == {16}
    sizes = np.array(shown.written[2:6:2]) - 32 * 256 * np.array([1, 2])
    assert shown.written[:2] == shown.written[:1] * 2 and (sizes >= 0).all() and (sizes < 256).all()


def test_no_bit_of_an_image_depends_on_the_batch_or_the_number_asked_for(cli, runs, sample):
    every = [sample("dit --lr 0.1", f"--per-class 13 --batch {n}") for n in (1, 16, 17, 64)]
    assert all(np.array_equal(each, every[0]) for each in every) and len(every[0]) == 39
    fewer = sample("dit --lr 0.1", "--per-class 2")
    assert np.array_equal(fewer[:2], every[0][:2])


def test_latents_are_no_picture(cli, train, tmp_path):
    for suffix in ("", "_test"):
        np.save(f"z{suffix}.npy", np.zeros((8, 4, 8, 8), np.float32))
        np.save(f"z{suffix}_labels.npy", np.arange(8) % 2)
    assert train("dit --data z.npy --out z").code == 0
    flags = "--per-class 1 --levels 2 --device cpu"
    refusal = cli(f"sample z {flags}")
    assert refused(refusal, "out must end in .npy where a sample has 4 channels, which are no pic")
    assert not Path("samples.png").exists()
    assert cli(f"sample z --out x.npy {flags}").code == 0 and np.load("x.npy").shape == (2, 4, 8, 8)
