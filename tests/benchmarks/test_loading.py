"""How long steps wait for images, by the number of workers."""

import json

import pytest
from PIL import Image

SMALL = "--images 12 --pixels 32 --batch 4 --dim 64 --depth 3 --rounds 3 --threads 1 --device cpu"


@pytest.fixture
def rows_of_main(run_main):
    """The rows of a benchmark as a command would print them."""
    return lambda program, words: list(
        map(json.loads, run_main(program, f"{words} --json").splitlines())
    )


def test_a_row_is_a_number_of_workers_and_says_how_long_a_step_waits(rows_of_main):
    rows = rows_of_main("loading", f"{SMALL} --workers 0 2")
    assert [row["workers"] for row in rows] == [0, 2]
    for row in rows:
        assert 0 < row["wait_ms"] < row["step_ms"] * 3 and 0 < row["share"] < 1
        assert row["suite"] == "loading" and row["samples_per_second"] > 0


def test_a_step_that_sleeps_waits_for_no_image_that_two_workers_have_read(rows_of_main):
    options = SMALL.replace("--rounds 3", "--rounds 8").replace("--batch 4", "--batch 12")
    (row,) = rows_of_main("loading", f"{options} --workers 2 --asleep-ms 60")
    assert "asleep for 60 ms" in row["preset"]
    assert row["step_ms"] > 60 and row["share"] < 0.3


def test_a_table_and_a_folder_that_is_given_stays(run_main, tmp_path):
    folder = tmp_path / "photos"
    said = run_main("loading", f"{SMALL} --workers 0 --folder {folder}")
    assert "loading: ViT of 3 layers of 64, 32 pixels, batch 4" in said and "waits, ms" in said
    files = sorted(folder.rglob("*.jpg"))
    assert len(files) == 12 and Image.open(files[0]).size == (32, 32)
    before = [path.read_bytes() for path in files]
    run_main("loading", f"{SMALL} --images 3 --workers 0 --folder {folder}")
    assert [path.read_bytes() for path in sorted(folder.rglob("*.jpg"))] == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": (0, -1)}, "workers must be at least 0, got -1"),
        ({"pixels": 100}, "pixels must be a multiple of 16, got 100"),
        ({"dim": 0}, "dim must be a multiple of 64, got 0"),
        ({"rounds": 1}, "rounds must be at least 2, got 1"),
        ({"asleep_ms": -1.0}, "asleep_ms must be at least 0, got -1.0"),
    ],
)
def test_rejects(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("loading").Options(**options)
