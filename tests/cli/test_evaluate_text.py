import json
import math
import re
import statistics
from functools import cache

import numpy as np
import pytest
from cli.runs import refused, rows_of

from dbkernels import write_tokens
from dbkernels.cli.main import main

SIZES = "--dim 16 --num-heads 2 --length 8 --steps 2 --batch-size 4 --lr 0.1 --device cpu"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """The directory of a tiny run on a text: a family and flags, trained once a module."""
    root = tmp_path_factory.mktemp("texts")
    ids = np.random.default_rng(0).integers(0, 5, 400)
    write_tokens(root / "text", {"train": [ids[:300]], "test": [ids[300:]]}, vocabulary=5)

    @cache
    def run(line):
        out = root / line.replace(" ", "")
        main(["train", *line.split(), *f"--out {out} --data {root}/text {SIZES}".split()])
        return out

    return run


BLOCKS, WHOLE, SHALLOW = (
    f"mdm --depth {depth} --num-blocks {blocks}" for depth, blocks in ((3, 3), (3, 1), (1, 1))
)


def linked(directory, **runs):
    """The runs under short names."""
    for name, run in runs.items():
        (directory / name).symlink_to(run)
    return " ".join(runs)


def line_of(out, name):
    """The first line of a run in what was printed, in words."""
    return next(line.split() for line in out.splitlines() if line.startswith(f"{name} "))


def test_bits_of_blocks_stand_beside_networks_of_all_layers_and_of_a_blocks(cli, texts, tmp_path):
    lines = {"three": BLOCKS, "whole": WHOLE, "one": SHALLOW}
    names = linked(tmp_path, **{name: texts(line) for name, line in lines.items()})
    blocks, whole, shallow = rows_of(cli(f"evaluate {names} --json"))
    assert (blocks["layers"], whole["layers"], shallow["layers"]) == ([1, 1, 1], [3], [1])
    assert blocks["more_than_all_layers"] == blocks["bits"] - whole["bits"]
    assert blocks["more_than_a_blocks_layers"] == blocks["bits"] - shallow["bits"]
    assert whole["more_than_all_layers"] is None and whole["end_to_end"]
    # the least time masks one token in ten thousand, which is said to cost log2(5)
    assert sum(blocks["bits_of_blocks"]) + 1e-4 * math.log2(5) == pytest.approx(blocks["bits"])
    assert (blocks["windows"], blocks["tokens"]) == (13, 104)

    out = cli(f"evaluate {names}").out
    assert max(map(len, out.splitlines())) <= 80
    assert "read: 13 windows of 8 tokens" in out and "sampler" not in out
    figures = (blocks[n] for n in ("bits", "more_than_all_layers", "more_than_a_blocks_layers"))
    assert line_of(out, "three") == ["three", "3", "3", "0", *(f"{each:.4g}" for each in figures)]
    assert line_of(out, "whole") == ["whole", "3", "1", "0", f"{whole['bits']:.4g}"]


NOISY, CLEAN, SHALLOW_CLEAN = (
    "ar --depth 2 --num-blocks 2",
    "ar --depth 2 --num-blocks 1 --objective conventional",
    "ar --depth 1 --num-blocks 1 --objective conventional",
)


def test_blocks_with_noise_tell_of_their_stop_and_of_their_sampler(cli, texts, tmp_path):
    lines = {"two": NOISY, "whole": CLEAN, "one": SHALLOW_CLEAN}
    names = linked(tmp_path, **{name: texts(line) for name, line in lines.items()})
    line = f"evaluate {names} --starts 3 --levels 4 --bridge argmax --device cpu"
    noisy, clean, _ = rows_of(cli(f"{line} --json"))
    assert 0.05 <= noisy["stop"] <= 8.0 and len(noisy["bits_of_blocks"]) == 2
    assert noisy["bits_down_to_least"] > sum(noisy["bits_of_blocks"])
    assert noisy["more_than_all_layers"] == noisy["bits"] - clean["bits"]
    told = noisy["sampler"]
    assert (told["starts"], told["bridge"], told["windows"]) == (3, "argmax", 2)
    assert len(told["levels"]) == 4 and noisy["sampler_bits"] > 0
    assert [len(curve["levels"]) for curve in noisy["curves"]] == [
        len(curve["cross_entropy"]) for curve in noisy["curves"]
    ]
    assert clean["sampler_bits"] is clean["stop"] is None and clean["end_to_end"]

    out = cli(line).out
    assert max(map(len, out.splitlines())) <= 80
    figures = ("bits_down_to_least", "bits_at_most_noise", "sampler_bits")
    words = out.split()
    assert all(f"{noisy[name]:.4g}" in words for name in figures)
    assert "sampler: argmax, 4 levels, 3 starts, 16 tokens of 2 windows" in out


def test_a_recurrent_model_is_evaluated_with_any_number_of_levels(cli, texts):
    run = texts("huginn --depth 3")
    rows = [rows_of(cli(f"evaluate {run} --starts 2 --levels {n} --json"))[0] for n in (1, 4)]
    assert [len(row["sampler"]["levels"]) for row in rows] == [1, 4]
    assert rows[0]["sampler_bits"] == pytest.approx(rows[0]["sampler_bits_once"])
    assert rows[0]["bits"] == rows[1]["bits"] and rows[0]["layers"] == [3]


def test_an_evaluation_shows_how_far_it_is_on_stderr_alone(cli, runs, texts, tmp_path):
    linked(tmp_path, noisy=texts(NOISY), clean=texts(CLEAN), masks=texts(WHOLE), vit=runs("vit"))
    line = "evaluate noisy clean masks vit --device cpu --json"
    outcome = cli(line)
    assert [row["run"] for row in rows_of(outcome)] == ["noisy", "clean", "masks", "vit"]
    told = [
        re.fullmatch(r"evaluating (\d+) of (\d+) passes(?:, \d:\d\d:\d\d left)?: (\w+)", each)
        for each in outcome.err.splitlines()
    ]
    ends = {each[3]: (int(each[1]), int(each[2])) for each in told}
    assert list(ends) == ["noisy", "clean", "masks", "vit"]
    assert all(done == total for done, total in ends.values()) and ends["clean"] == (13, 13)


def test_the_sampler_may_be_left_out(cli, texts):
    (row,) = rows_of(cli(f"evaluate {texts(NOISY)} --starts 0 --json"))
    assert row["sampler"] is row["sampler_bits"] is None and row["stop"]


def test_seeds_of_a_text_have_a_mean_and_a_spread(cli, texts):
    runs = [texts(BLOCKS), texts(f"{BLOCKS} --seed 1"), texts(WHOLE)]
    rows = rows_of(cli(f"evaluate {' '.join(map(str, runs))} --json"))
    out = cli(f"evaluate {' '.join(map(str, runs))}").out.splitlines()
    mean, spread = (
        next(line for line in out if line.startswith(name)) for name in ("mean", "spread")
    )
    bits = [row["bits"] for row in rows[:2]]
    assert f"{statistics.fmean(bits):.4g}" in mean.split()
    assert f"{statistics.stdev(bits):.1g}" in spread.split()
    beside = [row["more_than_all_layers"] for row in rows[:2]]
    assert f"{statistics.fmean(beside):.4g}" in mean.split()


def test_images_and_texts_have_tables_of_their_own(cli, runs, texts):
    outcome = cli(f"evaluate {runs('vit')} {texts(WHOLE)} --levels 2 --device cpu")
    assert outcome.code == 0
    assert "sigma_max" in outcome.out and "character" in outcome.out
    image, text = rows_of(cli(f"evaluate {runs('vit')} {texts(WHOLE)} --levels 2 --json"))
    assert "bits" not in image and "block_losses" not in text and len(image["levels"]) == 2


def test_windows_that_overlap_are_of_training_alone(cli, texts):
    (row,) = rows_of(cli(f"evaluate {texts(f'{WHOLE} --stride 3')} --json"))
    assert (row["windows"], json.loads(row["setting"])["stride"]) == (13, 3)


def test_so_many_samples_are_read(cli, runs, texts):
    (few,), (more,) = (
        rows_of(cli(f"evaluate {texts(BLOCKS)} --samples {count} --json")) for count in (4, 99)
    )
    assert (few["windows"], more["windows"]) == (4, 13) and few["bits"] != more["bits"]
    (some,), (every,) = (
        rows_of(cli(f"evaluate {runs('vit')} --json {more}")) for more in ("--samples 3", "")
    )
    # a third of an accuracy
    assert round(3 * some["accuracy"][-1], 6).is_integer()
    assert some["loss_at_sigma_max"] != every["loss_at_sigma_max"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mdm --levels 2", "levels must be left out: no run here has it, got 2"),
        ("mdm --starts 0", "starts must be left out: no run here has it, got 0"),
        ("mdm --bridge soft", "bridge must be left out: no run here has it, got soft"),
        ("mdm --samples 0", "samples must be at least 1, got 0"),
        ("mdm --data nowhere", "nowhere has no tokens.json"),
        ("clean --levels 2", "levels must be left out: no run here has it, got 2"),
        ("noisy clean --starts -1", "starts must be at least 0, got -1"),
        ("noisy --start noise", "start must be left out: no run here has it, got noise"),
        ("vit --bridge soft", "bridge must be left out: no run here has it, got soft"),
    ],
)
def test_rejects(cli, runs, texts, tmp_path, line, message):
    linked(tmp_path, mdm=texts(WHOLE), vit=runs("vit"), clean=texts(CLEAN), noisy=texts(NOISY))
    assert refused(cli(f"evaluate {line} --device cpu"), message)
