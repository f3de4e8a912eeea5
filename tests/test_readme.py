"""What the README and the pages under docs say is run, or compared with the code."""

import re
from pathlib import Path

import numpy as np
import pytest

from dbkernels import MMDiT
from dbkernels.diffusion.prediction import PREDICTIONS
from dbkernels.diffusion.samplers import SAMPLERS
from dbkernels.ops import POLICIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
MEMORY = (ROOT / "docs" / "memory.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def examples(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_four_statements_train_and_evaluate(capsys):
    example = examples(README)[0]
    imports, *statements = example.split("\n\n")
    assert imports.startswith("from dbkernels import ")
    assert len("\n".join(statements).splitlines()) == 4
    # the reader waits a minute for it, a test does not
    shortened = example.replace("steps=500", "steps=2")
    assert shortened != example
    names = {}
    exec(shortened, names)
    assert (len(names["blocks"]), names["trainer"].step) == (3, 6)
    assert "accuracy after each step" in capsys.readouterr().out


def test_the_layer_runs_alone():
    names = {}
    exec(examples(README)[1], names)
    assert names["layer"].modulation.weight.grad.any()


def test_the_table_is_that_of_the_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text()
    [table] = re.findall(r"^\| figure (?:.*\n\|)+.*\n", README, re.MULTILINE)
    assert len(table.splitlines()) == 2 + 6
    assert f"\n\n{table}\n" in results
    for command in re.findall(r"[A-D]: (`[^`]+`)", README):
        assert " ".join(command.split()) in " ".join(results.split())
    assert set(re.findall(r"\| ([A-D]) \|", table)) == set(re.findall(r"([A-D]): `", README))


def test_a_flow_in_three_blocks_is_as_the_page_has_it():
    page = (ROOT / "docs" / "noise.md").read_text()
    names = {}
    exec(examples(page)[0], names)
    assert (len(names["blocks"]), names["blocks"].process.time_shift) == (3, 3.0)
    lows = [interval.low for interval in names["Flow"]().intervals(3)[:2]]
    assert "meet at t = {:.3f} and {:.3f}".format(*lows) in page
    words = {name for names in PREDICTIONS.values() for name in names} | {*PREDICTIONS, *SAMPLERS}
    assert words <= set(re.findall(r"`(\w+)`", page))


def test_a_model_of_texts_and_images_trains_as_the_page_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "texts_and_images.md").read_text()
    for end, shape in {"": (1, 8, 8), "_text": (3, 5), "_pooled": (6,)}.items():
        np.save(f"captions{end}.npy", np.ones((8, *shape), dtype=np.float32))
    names = {}
    exec(examples(page)[0].replace("steps=500", "steps=1"), names)
    assert names["trainer"].step == 3
    assert names["model"].config.fields()["text"].shape == (3, 5)
    assert set(re.findall(r"^\| `(.*-\d+b|small)` \|", page, re.MULTILINE)) == set(MMDiT.presets)


def test_the_extras_are_those_of_the_project():
    rows = re.findall(r"^\| (`[^|]+) \| [^|]+ \|$", README, re.MULTILINE)
    project = (ROOT / "pyproject.toml").read_text()
    [extras] = re.findall(r"^\[project.optional-dependencies\]\n(.*?)\n\[", project, re.M | re.S)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(
        re.findall(r"^(\w+) =", extras, re.M)
    )


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 170
    assert all(len(page.read_text().splitlines()) < 200 for page in PAGES)


def test_the_policies_are_those_of_the_code():
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| (\d+) \| ([\d.]+) \|", MEMORY, re.MULTILINE)
    # of four layers in a row, the first keeps x; the lowest policy keeps nothing else
    units = {name: policy.units for name, policy in POLICIES.items()}
    assert rows == [(name, str(D), f"{D - 0.75 if D > 1 else D}") for name, D in units.items()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_it_names_exists(page):
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / name).exists(), name
