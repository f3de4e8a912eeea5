"""A package that comes with an extra, and that only those need who call for it."""

from importlib import import_module
from types import ModuleType


def needed(package: str, module: str, use: str, extra: str) -> ModuleType:
    """Import a package.

    Args:
        package:  its name, for messages
        module:   that it is imported as
        use:      what it is installed for
        extra:    that it comes with
    Raises:
        ValueError: it is not there, or cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise ValueError(
            f"{package} must be installed for {use} (pip install dbkernels[{extra}]), "
            f"got an environment without it: {error}"
        ) from None
