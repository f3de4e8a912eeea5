"""The files of tools/, which stand beside each other and are no package."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def tool(name):
    """Import one of them; some also import those of benchmarks/."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in ("benchmarks", "tools"):
            patch.syspath_prepend(str(ROOT / folder))
        return importlib.import_module(name)
