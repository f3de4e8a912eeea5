import numpy as np
import pytest
import torch
from cli.runs import refused
from PIL import Image

from dbkernels.cli.sample import ENLARGE_TO, picture, write_images
from dbkernels.training.diffusion_blocks import DiffusionBlocks

FAST = ["--levels", "3", "--device", "cpu"]


def test_writes_a_picture_with_a_row_for_each_class(cli, trained):
    trained("dit", "out")
    outcome = cli("sample", "out", "--per-class", "2", *FAST)
    assert (outcome.code, outcome.out) == (0, "wrote 6 images: samples.png\n")
    with Image.open("samples.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (2 * 64, 3 * 64))


def test_each_row_has_the_images_of_one_class(cli, trained, monkeypatch):
    asked = []

    def sample(blocks, batch, *arguments, **settings):
        asked.append(batch["label"].tolist())
        return torch.zeros(len(batch["label"]), 1, 8, 8)

    monkeypatch.setattr(DiffusionBlocks, "sample", sample)
    trained("dit", "out")
    cli("sample", "out", "--per-class", "2", *FAST)
    assert asked == [[0, 0, 1, 1, 2, 2]]


def test_writes_numbers_that_the_seed_decides(cli, trained, tmp_path):
    trained("dit", "out")
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        cli("sample", "out", "--out", f"{name}.npy", "--per-class", "2", "--seed", seed, *FAST)
    a, b, c = (np.load(tmp_path / f"{name}.npy", allow_pickle=False) for name in "abc")
    assert a.shape == (6, 1, 8, 8) and a.dtype == np.float32
    assert np.isfinite(a).all()
    assert np.array_equal(a, b) and not np.array_equal(a, c)


@pytest.mark.parametrize("flags", ["--sampler heun", "--grid karras", "--guidance 7"])
def test_every_setting_changes_the_images(cli, trained, tmp_path, flags):
    trained("dit", "out", "--lr", "0.1", "--label-drop", "0.5")
    cli("sample", "out", "--out", "a.npy", "--levels", "5")
    cli("sample", "out", "--out", "b.npy", "--levels", "5", *flags.split())
    assert not np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize(("label_drop", "guidance"), [("0", "1"), ("0.5", "2")])
def test_guidance_is_for_runs_that_dropped_labels(cli, trained, tmp_path, label_drop, guidance):
    trained("dit", "out", "--lr", "0.1", "--label-drop", label_drop)
    cli("sample", "out", "--out", "a.npy", "--levels", "5")
    cli("sample", "out", "--out", "b.npy", "--levels", "5", "--guidance", guidance)
    assert np.array_equal(np.load(tmp_path / "a.npy"), np.load(tmp_path / "b.npy"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("vit", "sample needs a run that generates, got one of vit"),
        ("dit --out x.gif", "out must end in .png or .npy, got x.gif"),
        ("dit --out no/x.png", "out must lie in a directory that exists, got no/x.png"),
        ("dit --out folder.png", "out must be a file, got the directory folder.png"),
        ("dit --per-class 0", "per_class must be at least 1, got 0"),
        ("dit --guidance nan", "guidance must be finite, got nan"),
        ("dit --guidance 2", "guidance must be 1 for a run that never dropped labels"),
        ("dit --levels 1", "a grid needs at least 2 levels, got 1"),
        ("nope", "a run's directory must hold config.json, got none in nope"),
    ],
)
def test_a_mistake_is_one_sentence_and_writes_no_image(cli, trained, tmp_path, arguments, message):
    trained("dit", "dit")
    trained("vit", "vit")
    (tmp_path / "folder.png").mkdir()
    before = set(tmp_path.rglob("*"))
    assert refused(cli("sample", *arguments.split()), message)
    assert set(tmp_path.rglob("*")) == before


def test_a_picture_maps_the_range_and_keeps_the_order():
    values = torch.tensor([-1.0, 0.0, 1.0, 9.0])[:, None, None, None]
    pixels = np.asarray(picture(values.expand(4, 1, 2, 2), per_row=2))
    side = ENLARGE_TO
    assert pixels.shape == (2 * side, 2 * side, 3)
    corners = pixels[:: side * 2 - 1, :: side * 2 - 1]
    assert corners[..., 0].tolist() == [[0, 128], [255, 255]]


def test_a_picture_shows_three_channels_of_a_latent_and_large_images_as_they_are():
    latent = torch.stack([torch.full((80, 80), v) for v in (-1.0, 1.0, -1.0, 1.0)])[None]
    pixels = np.asarray(picture(latent, per_row=1))
    assert pixels.shape == (80, 80, 3)
    assert pixels[0, 0].tolist() == [0, 255, 0]


def test_numbers_are_written_as_they_are(tmp_path):
    images = torch.randn(2, 4, 3, 3) * 5
    write_images(images, tmp_path / "x.npy", 1)
    assert np.array_equal(np.load(tmp_path / "x.npy"), images.numpy())
    assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]
