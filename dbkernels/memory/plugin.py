"""A fixture for pytest; a test suite asks for it by `pytest_plugins = ["dbkernels.memory.plugin"]`.

No entry point loads it unasked: that would import torch in every run of pytest.
"""

from collections.abc import Callable

import pytest

from dbkernels.memory.budget import require_within
from dbkernels.memory.measure import Prediction


@pytest.fixture
def memory_budget() -> Callable[..., Prediction]:
    """`require_within`: fails a test whose training step needs more memory than a ceiling.

    memory_budget(step, model=model, optimizers=[optimizer], ceiling="1.5 GiB")
    """
    return require_within
