from importlib.util import find_spec

import torch

from dbkernels.ops.backend import library

# without a compiler there is nothing here to test
collect_ignore_glob = [] if find_spec("dbkernels.ops._maths") else ["test_*.py"]
collect_ignore = []
if not library.serves("add_noise_fwd", torch.device("cpu")):
    collect_ignore += ["test_compiled.py"]
