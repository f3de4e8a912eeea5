"""Recorded runs come out as they were; `record.py` writes them anew."""

import re
from pathlib import Path

import pytest
from golden import recording
from golden.configurations import CONFIGURATIONS, implementation_name, plain_torch, run, settled

# of `recording.difference`, for every machine: 8 times the largest that `record.py` printed over
# capabilities DEFAULT, AVX2 and AVX512, compiled code and plain torch, 1 and 2 threads
FLOAT32_TOLERANCE = 8 * 1.5e-5
# twice the largest: AdamW makes a bias move by the sign of a gradient that is rounding in bfloat16,
# so here the digests are what holds the parameters
AUTOCAST_TOLERANCE = 2 * 0.2

SETUP = Path(__file__).parents[2] / "tools" / "setup.sh"
RECORDED = recording.read()


@pytest.mark.parametrize("plain", [False, True], ids=["chosen", "torch"])
@pytest.mark.parametrize("key", CONFIGURATIONS)
def test_a_run_comes_out_as_it_was_recorded(tmp_path, key, plain):
    with settled(), plain_torch(plain):
        environment = recording.environment(implementation_name())
        done = run(key, tmp_path)
    tolerance = AUTOCAST_TOLERANCE if "autocast" in key else FLOAT32_TOLERANCE
    numbers = recording.numbers(done)
    assert recording.difference(numbers, RECORDED["numbers"][key]) <= tolerance
    if environment in RECORDED["bits"]:
        assert recording.digests(done) == RECORDED["bits"][environment][key], environment


def test_the_fixture_has_every_run_and_no_other():
    for runs in (RECORDED["numbers"], *RECORDED["bits"].values()):
        assert runs.keys() == CONFIGURATIONS.keys()


def test_the_torch_of_ci_is_recorded_with_every_capability_and_implementation():
    version = re.search(r"torch==([\d.]+)", SETUP.read_text())[1]
    recorded = {tuple(environment.split()[:3]) for environment in RECORDED["bits"]}
    for capability in ("DEFAULT", "AVX2", "AVX512"):
        for implementation in ("compiled", "torch"):
            assert (f"{version}+cpu", capability, implementation) in recorded


def test_the_fixture_is_small_and_written_as_it_would_be_again():
    text = recording.FIXTURE.read_text()
    assert text == recording.written(RECORDED)
    assert len(text) < 60_000


def example():
    weights = [[4, 1.0, 2.0], [4, 0.0, 0.0]]
    return {"losses": [2.0, 1.0], "weights": weights, "ema": [[4, 1.0, 2.0]]}


@pytest.mark.parametrize(
    ("group", "index", "value", "expected"),
    [
        ("losses", 1, 1.5, 0.25),
        ("losses", 1, float("nan"), float("inf")),
        ("weights", 0, [4, 2.0, 2.0], 8**-0.5),
        ("weights", 0, [4, 1.0, 3.0], 0.5),
        ("weights", 1, [4, 4e-6, 0.0], 1.0),
        ("weights", 0, [5, 1.0, 2.0], float("inf")),
        ("ema", 0, [4, 1.0, 1.0], 0.5),
    ],
)
def test_differences_are_relative_to_the_size_of_a_number(group, index, value, expected):
    other = example()
    other[group][index] = value
    assert recording.difference(example(), example()) == 0
    assert recording.difference(other, example()) == pytest.approx(expected)


@pytest.mark.parametrize("group", ["losses", "weights", "ema"])
def test_runs_of_other_lengths_differ(group):
    other = example()
    other[group].pop()
    assert recording.difference(other, example()) == float("inf")
    del other[group]
    if group != "losses":
        assert recording.difference(other, example()) == float("inf")
