import json

import pytest
from cli.plans import in_turn, reckoned
from rich.console import Console

import dbkernels.cli.plan_search as module
from dbkernels.cli.plan_search import Question, answer
from dbkernels.cli.plan_tables import rows, show


@pytest.fixture
def planned(monkeypatch, capsys):
    monkeypatch.setattr(module, "estimate", reckoned)
    monkeypatch.setattr(module, "_run", in_turn)

    def found(memory, autocast=False):
        question = Question("dit", "digits", 64, autocast, "cpu", memory * 2**20)
        every = list(rows(question, answer(question, lambda total: None)))
        show(question, every, Console(width=80))
        return every, capsys.readouterr().out

    return found


def test_rows_are_json_and_carry_the_question(planned):
    every, _ = planned(1000)
    assert [row["row"] for row in every] == ["limit"] * 2 + ["plan"] * (len(every) - 3) + ["preset"]
    assert all(row["memory"] == 1000 * 2**20 and row["preset"] == "digits" for row in every)
    assert json.loads(json.dumps(every)) == every
    assert every[-1]["largest"] == "XL/2"


def test_what_limits_is_the_largest_share(planned):
    (whole, best, *_), _ = planned(1000)
    assert (whole["of"], whole["limit"]) == ("end to end", "saved_activations")
    for row in (whole, best):
        assert sum(row["by_category"].values()) == row["peak_reserved_bytes"]
        assert row["by_category"]["stem_and_head"] == 16 * 2**20
    (_, small, *_), text = planned(60)
    assert small["limit"] == "optimizer"
    assert "of it optimizer of the layers" in text.replace("\n", " ")


def test_the_screen_fits_and_leads_with_what_limits(planned):
    every, text = planned(1000)
    lines = text.splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in text
    assert lines[0] == "dit digits, batch 64, float32 compute, on cpu with 1000 MiB"
    said = " ".join(lines[1:4])
    assert "it needs 8.62 GiB" in said and "does not fit: saved activations limit this run" in said
    plans = [row for row in every if row["row"] == "plan"]
    at = next(i for i, line in enumerate(lines) if line.strip().startswith("blocks"))
    for row, line in zip(plans, lines[at + 2 :], strict=False):
        count, recompute, offload, micro_batch, peak, time = (c.strip() for c in line.split("│"))
        assert (int(count), recompute) == (row["num_blocks"], row["recompute"])
        assert offload == {"none": "all blocks", "cpu": "one block"}[row["offload"]]
        assert int(micro_batch) == row["micro_batch"] and peak.endswith("iB")
        assert time == f"{row['relative_time']:.2f}"
    assert "Largest preset of dit that fits at all: XL/2." in lines
    assert "not measured" in text


def test_where_end_to_end_fits_the_screen_says_so(planned):
    _, text = planned(10**5)
    assert "and fits: saved activations limit" in text.replace("\n", " ").replace("  ", " ")


def test_the_command_has_every_choice_that_differs_from_the_defaults(planned):
    every, text = planned(150, autocast=True)
    plans = [row for row in every if row["row"] == "plan"]
    one = next(row for row in plans if row["offload"] == "cpu")
    start = "python -m dbkernels train dit --preset digits --batch-size 64"
    cut = 64 // one["micro_batch"]
    middle = f"--num-blocks {one['num_blocks']} --recompute {one['recompute']}"
    end = "--offload cpu --steps-per-swap 0 --autocast"
    assert cut > 1
    assert one["command"] == f"{start} {middle} --accumulate {cut} {end}"
    first = plans[0]["command"].split(" --num-blocks")
    assert f"  {first[0]} \\\n    --num-blocks{first[1]}\n" in text
    (*_, whole, _), _ = planned(10**6)
    assert "--accumulate" not in whole["command"]
