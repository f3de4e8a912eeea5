import importlib
import json
import sys
from pathlib import Path

import pytest

from dbkernels.training.trainer import TrainerConfig

TOOLS = Path(__file__).parents[1] / "tools"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The demo's folder after a demo of a few steps."""
    sys.path.insert(0, str(TOOLS))
    try:
        demo = importlib.import_module("demo")
    finally:
        sys.path.remove(str(TOOLS))
    out = tmp_path_factory.mktemp("demo")
    short = TrainerConfig(steps=1, batch_size=8)
    demo.Demo(out=out, classifier=short, generator=short, per_class=10).run()
    (folder,) = out.iterdir()
    return folder


def test_writes_results_that_the_report_shows(finished):
    results = json.loads((finished / "demo.json").read_text())
    assert [run["num_blocks"] for run in results["classification"]] == [1, 3]
    assert [run["num_blocks"] for run in results["generation"]] == [1, 3]
    page = (finished / "report.html").read_text()
    assert "Fréchet" in page and "FID" not in page


def test_one_of_three_blocks_keeps_about_a_third_for_its_backward(finished):
    results = json.loads((finished / "demo.json").read_text())
    for task in ("classification", "generation"):
        whole, blocks = results[task]
        assert blocks["saved_bytes"] <= 0.36 * whole["saved_bytes"]
        assert blocks["peak_bytes"] < whole["peak_bytes"]


def test_every_run_can_be_evaluated_again(finished):
    from dbkernels.training.run import load_run

    for name in ("vit-1", "vit-3", "dit-1", "dit-3"):
        config, blocks = load_run(finished / name, device="cpu")
        assert len(blocks) == config.partition.num_blocks
