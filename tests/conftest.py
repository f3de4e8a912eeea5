import os

import pytest
import torch

# cuBLAS gives deterministic algorithms with this alone, and reads it when it first runs
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    # read when triton is imported, so it must be set before anything here imports it
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import interpreter

    interpreter.repair()

NEEDS_GPU = "needs a GPU"  # of a test that a rehearsal leaves out


def pytest_addoption(parser):
    parser.addoption(
        "--rehearse",
        action="store_true",
        help="run the tests marked gpu on a CPU at tiny sizes, with -m gpu",
    )


def pytest_configure(config):
    if config.getoption("--rehearse") and torch.cuda.is_available():
        raise pytest.UsageError("--rehearse is for a machine without a GPU, got one with a GPU")
    if config.getoption("--rehearse"):
        # of so small tensors threads wait for each other
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--rehearse"):
        return
    for item in items:
        mark = item.get_closest_marker("needs_gpu")
        if mark:
            (reason,) = mark.args
            item.add_marker(pytest.mark.skip(reason=f"{NEEDS_GPU}: {reason}"))


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--rehearse"):
        skipped = terminalreporter.stats.get("skipped", [])
        count = sum(NEEDS_GPU in str(report.longrepr) for report in skipped)
        terminalreporter.line(f"{NEEDS_GPU}, so not rehearsed: {count} tests")


@pytest.fixture(autouse=True)
def seed_and_poison():
    """Same numbers every run, and NaN in every buffer that is read before it is written."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def rehearsed(request):
    """Whether tests marked gpu run on a CPU, to find their own mistakes."""
    return request.config.getoption("--rehearse")


@pytest.fixture(scope="session")
def gpu(rehearsed):
    """The device of a test marked gpu."""
    return torch.device("cpu" if rehearsed else "cuda")


@pytest.fixture(scope="session")
def size(rehearsed):
    """size(real, tiny): which of two sizes a test marked gpu has here."""
    return lambda real, tiny: tiny if rehearsed else real
