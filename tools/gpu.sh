#!/usr/bin/env bash
# With an NVIDIA GPU and the python3 that is there, without a network: builds csrc, runs the tests
# that need the GPU, reports on its kernels and runs the benchmarks, in less than eight minutes.
# Results go to $OUT, or else to benchmarks/results/<device>. A part that fails does not keep the
# others from running; the script then ends with 1 and names it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1
failed=""

missing=$("$python" -c '
from importlib.util import find_spec
needed = ["torch", "triton", "numpy", "scipy", "safetensors", "PIL", "rich", "pytest"]
print(*(name for name in needed if find_spec(name) is None))')
if [ -n "$missing" ]; then
    echo "gpu.sh needs packages that $python lacks: $missing" >&2
    exit 1
fi
# such as "90 nvidia-h100-80gb-hbm3"
device=$(PYTHONPATH=$PWD/benchmarks:$PYTHONPATH "$python" -c '
import torch, machine
if torch.cuda.is_available():
    major, minor = torch.cuda.get_device_capability()
    print(10 * major + minor, machine.folder_name(torch.device("cuda")))')
if [ -z "$device" ]; then
    echo "gpu.sh needs an NVIDIA GPU that torch can use, and found none" >&2
    exit 1
fi
out=${OUT:-benchmarks/results/${device#* }}
mkdir -p "$out"

# seconds, name of the result, command
part() {
    echo "${*:3}"
    if ! timeout "$1" "${@:3}" >"$out/$2"; then
        failed="$failed $2"
    fi
}

# without it Triton serves, which is no failure of what follows
part 60 build.txt "$python" setup.py build_ext --inplace
# the report needs processors and no GPU, so it runs beside the tests; its rows are no benchmark's,
# which the report of benchmarks would look for in *.jsonl
report=""
if "$python" -c 'import tyro' 2>/dev/null; then
    timeout 100 "$python" tools/kernel_report.py --json --arch "${device% *}" >"$out/kernels.ndjson" &
    report=$!
else
    echo "The report on kernels is left out: $python lacks tyro."
fi
if marked=$(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests); then
    # the tests ask for deterministic algorithms, which cuBLAS gives with this alone
    export CUBLAS_WORKSPACE_CONFIG=:4096:8
    # shellcheck disable=SC2086
    part 80 tests.txt "$python" -m pytest -q -m gpu $marked
    unset CUBLAS_WORKSPACE_CONFIG
    tail -n 3 "$out/tests.txt"
else
    echo "No test is marked gpu."
fi
if [ -n "$report" ] && ! wait "$report"; then
    failed="$failed kernels.ndjson"
fi

part 130 layer.jsonl "$python" benchmarks/layer.py --json
part 70 ops.jsonl "$python" benchmarks/ops.py --json
# its options need a parser of commands
if "$python" -c 'import tyro' 2>/dev/null; then
    part 95 training.jsonl "$python" benchmarks/training.py --json --preset S/2 --family dit \
        --num-blocks 1 3 --rungs none qkv --gradients kept --rounds 12 --processes 4 \
        --methods end_to_end checkpointed selective block_stock block_fused
    part 45 graphs.jsonl "$python" benchmarks/training.py --json --preset S/2 --family dit \
        --num-blocks 3 --rungs none --resident all --gradients kept --launch ops graph \
        --rounds 12 --processes 4 --methods end_to_end block_fused
else
    echo "The benchmark of training is left out: $python lacks tyro."
fi
for name in ops layer training graphs; do
    if [ -s "$out/$name.jsonl" ]; then "$python" benchmarks/show.py "$out/$name.jsonl"; fi
done
if [ -n "$failed" ]; then
    echo "Failed, or cut off at the limit of time:$failed (in $out)" >&2
    exit 1
fi
