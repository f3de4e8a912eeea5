"""What the README says is run as it stands there."""

import re
from pathlib import Path

import pytest

from dbkernels.memory.budget import require_within
from dbkernels.ops import POLICIES

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_trains_and_classifies():
    example = code_blocks("python")[0]
    # the reader waits a minute for it, a test does not
    shortened = re.sub(r"steps=\d+", "steps=1", example)
    assert shortened != example
    names = {}
    exec(shortened, names)
    assert len(names["blocks"]) == 3
    assert len(names["logits"]) == 3


def test_the_layer_runs_alone():
    names = {}
    exec(code_blocks("python")[1], names)
    assert names["layer"].modulation.weight.grad.any()


def test_the_policies_are_those_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d+) \| ([\d.]+) \|", README, re.MULTILINE)
    # of four layers in a row, the first keeps x; the lowest policy keeps nothing else
    units = {name: policy.units for name, policy in POLICIES.items()}
    assert rows == [(name, str(D), f"{D - 0.75 if D > 1 else D}") for name, D in units.items()]


def test_every_command_line_parses(monkeypatch):
    import shlex

    from dbkernels.cli import main as cli

    ran = []
    verbs = (cli.Train, cli.Sample, cli.Evaluate, cli.Profile, cli.Plan, cli.Doctor)
    for verb in verbs:
        monkeypatch.setattr(verb, "run", lambda self: ran.append(type(self).__name__))
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    calls = [words[3:] for words in commands if words[1:3] == ["-m", "dbkernels"]]
    for call in calls:
        cli.main(call)
    assert set(ran) == {verb.__name__ for verb in verbs}


def test_the_budget_holds_for_the_example():
    names = {}
    exec(code_blocks("python")[2], names)
    names["test_a_training_step_stays_within_its_memory"](require_within)
    with pytest.raises(AssertionError, match="needs"):
        names["test_a_training_step_stays_within_its_memory"](
            lambda step, **settings: require_within(step, **settings | {"ceiling": "1.5 GiB"})
        )


def test_every_file_it_names_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (root / name).exists(), name
