"""What a block's step runs before and after its layers, fused by torch.compile.

The stem and the head are strings of small ops, each a launch and a pass over memory. They leave out
the layers, and what would cost a compiled run its bits or its time: rows of a table, whose gradient
compiled code adds up in no fixed order on a GPU, and noise, which is told a step that compiled code
would take for a constant.

It is for GPUs, where launches cost most. On a CPU it saves no time, and the gradient of a bias
rounds more: there compiled code adds rows one after another, which torch adds in groups.
"""

import os
import shutil
import sysconfig
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dbkernels.models.compiled import own_code
from dbkernels.models.family import FamilyModule


def compile_stem_and_head(model: FamilyModule, device: torch.device | str) -> None:
    """Compile a family's stem and head for where a gradient is asked for, and nowhere else.

    They are compiled when they first run, for that shape and dtype. A copy that is made of the
    model later has its own parameters and the same code.

    Args:
        model:   in place; its parameters and their names stay
        device:  that it will run on
    Raises:
        ValueError: something is missing that compiled code is built with.
    """
    missing = _missing(torch.device(device))
    if missing is not None:
        raise ValueError(f"compile_stem_and_head needs {missing}, got none")
    for name in model.stem_and_head:
        plain = getattr(type(model), name)
        # of two kernels none is chosen by its time, which would make a run's bits a matter of luck
        options: dict[str, Any] = {"deterministic": True}
        code = torch.compile(own_code(plain), fullgraph=True, dynamic=False, options=options)
        setattr(model, name, partial(_run, code, plain, model))


def _run(
    code: Callable[..., object], plain: Callable[..., object], model: nn.Module, *args: object
) -> object:
    # a sampler's batches have many sizes, and torch compiles one function for few
    return (code if torch.is_grad_enabled() else plain)(model, *args)


def _missing(device: torch.device) -> str | None:
    """What torch would fail to find when it compiles for a device."""
    # the scheme that torch and triton ask for, too
    if not Path(sysconfig.get_path("include", "posix_prefix"), "Python.h").is_file():
        return "the headers of Python (Python.h)"
    if device.type == "cuda":
        found = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return None if found else "a C compiler: gcc or clang on PATH, or the one that CC names"
    # takes seconds to import, which is for those to pay who compile
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "a C++ compiler: g++ on PATH, or the one that CXX names"
    return None
