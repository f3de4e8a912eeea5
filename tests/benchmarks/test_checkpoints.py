"""What a checkpoint costs, ours and of torch."""

import json

import pytest

SMALL = "--mib 1 --rounds 2 --product 64 --threads 1 --device cpu"
MiB = 2**20


def test_a_row_is_a_way_to_save_and_ours_alone_notices_every_flip(run_main):
    said = run_main("checkpoints", f"{SMALL} --flips 6 --json")
    rows = [json.loads(line) for line in said.splitlines()]
    alone = ["ours", "ours beside", "DCP", "DCP beside", "torch.save"]
    assert [row["impl"] for row in rows] == [*alone, *alone[:4]]
    assert [row["processes"] for row in rows] == [1] * 5 + [2] * 4
    for row in rows:
        assert row["suite"] == "checkpoints" and row["state_bytes"] == MiB
        assert MiB < row["disk_bytes"] < 1.2 * MiB
        assert 0 < row["stall_ms"] <= row["durable_ms"] and row["slowed_ms"] >= 0
        assert row["flips"] == 6
        if row["impl"].endswith("beside"):
            assert row["noticed"] is None
        else:
            assert row["noticed"] == 6 if row["impl"] == "ours" else row["noticed"] < 6


def test_a_table_and_a_folder_of_the_disk_that_is_measured(run_main, tmp_path):
    said = run_main("checkpoints", f"{SMALL} --flips 1 --processes 1 --folder {tmp_path}")
    assert "checkpoints: 1.00 MiB of 1 process, products of 64 rows" in said
    assert "steps stand still, ms" in said and "flips noticed" in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mib": 0}, "mib must be at least 1, got 0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
        ({"flips": -1}, "flips must be at least 0, got -1"),
        ({"processes": (1, 0)}, "processes must divide the rows of 96 MiB, got 0"),
        ({"processes": (5,)}, "processes must divide the rows of 96 MiB, got 5"),
    ],
)
def test_rejects(bench, options, message):
    with pytest.raises(ValueError, match=message):
        bench("checkpoints").Options(**options)
