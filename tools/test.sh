#!/usr/bin/env bash
# Sets up what is missing, compiles the kernels and runs the tests; arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m mypy
# two processes of one thread each take two cores less time than one process of two threads
export OMP_NUM_THREADS=1
{
    # fails, and says why, where a kernel spills registers or its accesses are narrow
    .venv/bin/python tools/kernel_report.py >/dev/null
    # and as the Triton of a GPU machine compiles them, which is not that of torch here
    bash tools/other_triton.sh 3.6.0 --arch 90 --D 128 384 768 1024 1152 1536 4096 >/dev/null
} &
kernels=$!
# what a GPU's few minutes are for, on this CPU
PYTHON=.venv/bin/python bash tools/gpu.sh --rehearse
wait "$kernels"
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
# what is timed has the machine to itself
timed=tests/benchmarks/test_ratios.py
.venv/bin/python -m pytest "$timed"
exec .venv/bin/python -m pytest -n 2 --dist worksteal --ignore "$timed"
