import json

import pytest
from cli.runs import refused

from dbkernels.memory.measure import CATEGORIES

FAST = ["--batch", "2", "--steps", "1", "--device", "cpu"]


def test_json_has_every_figure_of_each_number_of_blocks(cli):
    outcome = cli("profile", "--num-blocks", "1,3", "--json", *FAST)
    one, three = (json.loads(line) for line in outcome.out.splitlines())
    assert (one["num_blocks"], three["num_blocks"]) == (1, 3)
    for row in (one, three):
        assert set(row["by_category"]) == set(CATEGORIES)
        assert sum(row["by_category"].values()) == row["peak_bytes"]
        assert 0 < row["seconds_per_step"] <= row["seconds_per_sweep"]
        assert row["device"] == "cpu"
    assert three["saved_bytes"] < one["saved_bytes"]
    assert one["seconds_per_sweep"] == one["seconds_per_step"]
    assert three["seconds_per_sweep"] == pytest.approx(3 * three["seconds_per_step"])


def test_the_table_fits_a_terminal_and_has_a_column_for_each_number_of_blocks(cli):
    outcome = cli("profile", "--num-blocks", "1,2,3,4,6", "--family", "dit", *FAST)
    lines = outcome.out.splitlines()
    assert outcome.code == 0
    assert max(map(len, lines)) <= 80
    assert "…" not in outcome.out
    assert lines[1].replace("┃", "").split()[-5:] == ["1", "2", "3", "4", "6"]
    for name in ("peak, MiB", "saved activations, MiB", "time of a sweep, ms"):
        (line,) = [line for line in lines if line.strip().startswith(name)]
        assert len(line.split("│")) == 6


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num-blocks 13", "num_blocks must be between 1 and the 12 layers, got 13"),
        ("--num-blocks 0", "num_blocks must be between 1 and the 12 layers, got 0"),
        ("--num-blocks 1;2", "num_blocks must be whole numbers with commas between, got 1;2"),
        ("--preset huge", "preset of vit must be one of cifar100, digits, got huge"),
        ("--batch 0", "batch and steps must be at least 1, got batch 0 and steps 1"),
        ("--steps 0", "batch and steps must be at least 1, got batch 2 and steps 0"),
        ("--device tpu", "device must be auto, cpu or cuda, got tpu"),
    ],
)
def test_rejects(cli, flags, message):
    assert refused(cli("profile", *FAST, *flags.split()), message)
