"""What the README says is run as it stands there."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def code_blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_example_trains_and_classifies():
    (example,) = code_blocks("python")
    # the reader waits a minute for it, a test does not
    shortened = re.sub(r"steps=\d+", "steps=1", example)
    assert shortened != example
    names = {}
    exec(shortened, names)
    assert len(names["blocks"]) == 3
    assert len(names["logits"]) == 3


def test_every_command_line_parses(monkeypatch):
    import shlex

    from dbkernels.cli import main as cli

    ran = []
    for verb in (cli.Train, cli.Sample, cli.Evaluate, cli.Profile):
        monkeypatch.setattr(verb, "run", lambda self: ran.append(type(self).__name__))
    lines = "\n".join(code_blocks("bash")).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    calls = [words[3:] for words in commands if words[1:3] == ["-m", "dbkernels"]]
    for call in calls:
        cli.main(call)
    assert {"Train", "Sample", "Evaluate", "Profile"} <= set(ran)


def test_every_file_it_names_exists():
    root = Path(__file__).parents[1]
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (root / name).exists(), name
