"""A model of images and texts from the command line, from its data to a picture."""

from pathlib import Path

import numpy as np
import pytest
from cli.runs import SIZES, read_tree, refused, rows_of, write_captions
from PIL import Image

from dbkernels.cli.main import main

FLAGS = "--label-drop 0.5 --num-blocks 2 --lr 0.1"
FEW = "--per-class 2 --levels 3 --device cpu"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory of a run and of what it was trained on."""
    root = tmp_path_factory.mktemp("captions")
    write_captions(root)
    out = f"--out {root}/run --data {root}/z.npy"
    main(["train", "mmdit", *out.split(), *SIZES, *FLAGS.split()])
    return root


@pytest.fixture
def sample(cli, trained):
    """Samples of the run for its prompts."""

    def run(flags, prompts="prompts.npz"):
        return cli(f"sample {trained}/run --prompts {trained}/{prompts} {FEW} {flags}")

    return run


def test_a_run_is_evaluated_on_the_split_beside_its_data(cli, trained):
    (row,) = rows_of(cli(f"evaluate {trained}/run --json --device cpu"))
    assert len(row["block_losses"]) == row["num_blocks"] == 2 and row["family"] == "mmdit"
    (other,) = rows_of(cli(f"evaluate {trained}/run --json --device cpu --split train"))
    assert other["block_losses"] != row["block_losses"]


def test_a_picture_has_a_row_for_each_prompt(sample):
    outcome = sample("--out x.png")
    assert (outcome.code, outcome.out) == (0, "wrote 4 images: x.png\n")
    assert Image.open("x.png").size == (2 * 64, 2 * 64)


def test_guidance_is_two_where_texts_were_dropped_and_each_prompt_has_its_images(sample, trained):
    found = []
    for flags in ("", "--guidance 2", "--guidance 1", "--seed 1"):
        assert sample(f"--out x.npy {flags}").code == 0
        found.append(np.load("x.npy"))
    first, guided, plain, other = found
    assert first.shape == (4, 1, 8, 8) and np.isfinite(first).all()
    assert np.array_equal(first, guided)
    assert not np.array_equal(first, plain) and not np.array_equal(first, other)
    prompts = dict(np.load(trained / "prompts.npz"))
    prompts["text"][1] += 1
    np.savez(trained / "changed.npz", **prompts)
    assert sample("--out x.npy", "changed.npz").code == 0
    same = (np.load("x.npy") == first).all(axis=(1, 2, 3))
    assert same.tolist() == [True, True, False, False]


def test_latents_without_embeddings_of_all_the_text_are_numbers(cli, tmp_path):
    write_captions(tmp_path, channels=4, pooled=False)
    assert cli(f"train mmdit --out run --data z.npy {' '.join(SIZES)}").code == 0
    line = f"sample run --prompts prompts.npz {FEW}"
    assert refused(cli(line), "out must end in .npy where a sample has 4 channels")
    assert cli(f"{line} --out x.npy --sampler heun").code == 0
    assert np.load("x.npy").shape == (4, 4, 8, 8)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "sample run",
            "prompts must be an .npz of embeddings for a model of images and texts, got",
        ),
        ("sample run --prompts no.npz", "got no.npz, which is no file"),
        ("sample run --prompts z_text.npy", "z_text.npy is not a whole .npz file"),
        ("sample run --prompts wide.npz", "text of wide.npz must be (N, 3, 5), as the model is"),
        ("sample run --prompts alone.npz", "alone.npz must have text and pooled, as the model"),
        ("sample run --prompts prompts.npz --out x.gif", "out must end in .png or .npy, got x.gif"),
        (
            "sample dit --prompts prompts.npz",
            "prompts must not be given for a model of classes, got",
        ),
        (
            "train mmdit --out out",
            "images with texts must be an .npy file with embeddings beside it",
        ),
        (
            "train mmdit --out out --data z.npy --convert rgb",
            "convert must be none where data is no",
        ),
        (
            "train mmdit --out out --data z.npy --steps 2 --num-heads 32",
            "a head must have a width that 4 divid",
        ),
        ("train mmdit --out out --data lonely.npy", "lonely_text.npy is missing"),
        ("train dit --out out --data z.npy", "z_labels.npy is missing"),
        ("evaluate run --data other/z.npy", "must have text and pooled, as the model is made for"),
        ("plan --memory 1GiB --preset huge", "preset must be one of cifar100, digits, published"),
        ("profile --preset huge", "preset must be one of cifar100, digits, published"),
    ],
)
def test_a_mistake_is_one_line_and_touches_no_file(cli, runs, trained, tmp_path, line, message):
    write_captions(tmp_path)
    (tmp_path / "other").mkdir()
    write_captions(tmp_path / "other", pooled=False)
    (tmp_path / "run").symlink_to(trained / "run")
    (tmp_path / "dit").symlink_to(runs("dit"))
    np.save("lonely.npy", np.zeros((8, 1, 8, 8), np.float32))
    text, pooled = np.zeros((2, 3, 4), np.float32), np.zeros((2, 6), np.float32)
    np.savez("wide.npz", text=text, pooled=pooled)
    np.savez("alone.npz", text=np.zeros((2, 3, 5), np.float32))
    before = read_tree(tmp_path)
    assert refused(cli(line), message)
    assert read_tree(tmp_path) == before and not Path("out").exists()
