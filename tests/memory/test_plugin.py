import pytest

TESTS = """
import torch

def test_small(memory_budget):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.zeros(32, 64)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    memory_budget(step, model=model, optimizers=[optimizer], ceiling="1 MiB")
    memory_budget(step, model=model, optimizers=[optimizer], ceiling="20 KiB")  # the line at fault
"""


def test_a_suite_that_asks_for_it_fails_with_the_categories(tmp_path, capsys):
    (tmp_path / "conftest.py").write_text('pytest_plugins = ["dbkernels.memory.plugin"]\n')
    (tmp_path / "test_memory.py").write_text(TESTS)
    code = pytest.main(
        ["-q", "-p", "no:cacheprovider", "-W", "ignore", "--rootdir", str(tmp_path), str(tmp_path)]
    )
    out = capsys.readouterr().out
    assert code == pytest.ExitCode.TESTS_FAILED
    assert "# the line at fault" in out and "bytes_from" not in out
    assert "AssertionError: the step needs" in out
    for name in ("parameters", "gradients", "inputs"):
        assert f"E         {name} " in out
