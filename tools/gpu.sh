#!/usr/bin/env bash
# The minutes of an NVIDIA GPU, in the order of their worth, without a network:
#
#   bash tools/gpu.sh [--rehearse] [smoke|headline|kernels|rest ...]
#
# smoke builds csrc and runs the tests that need the GPU; headline measures whole training steps,
# kernels the ops; rest is graphs and a profile. No name means all, in less than eight minutes. Each
# job has a limit of time and writes its rows as they come, so a cut loses no more than its own; the
# end is a table, and 1 where a part failed. Rows go to $OUT, or else benchmarks/results/<device>.
# PATIENCE=2 doubles the limits, for whoever has the minutes and asks for few parts.
#
# python3 needs what tools/gpu_wheels.sh does not fetch; the rest is installed from .whl. Where no
# git is, DBKERNELS_COMMIT names the commit. A rehearsal needs no GPU: the same programs run on a
# CPU at small sizes, and their rows are thrown away.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
rehearse=""
parts=()
for word in "$@"; do
    if [ "$word" = --rehearse ]; then rehearse=--rehearse; else parts+=("$word"); fi
done

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if compgen -G '.whl/*.whl' >/dev/null && [ -z "$rehearse" ]; then
    # what is then still missing is named below
    "$python" -m pip install --quiet --disable-pip-version-check --no-index --no-deps --no-compile \
        --target "$scratch/site" .whl/*.whl 2>"$scratch/said" || true
fi
export PYTHONPATH=$PWD:$scratch/site${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
export PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 # of whatever else is installed there
missing=$("$python" -c '
from importlib.util import find_spec
needed = ["torch", "triton", "numpy", "scipy", "safetensors", "PIL", "rich", "ninja", "pytest",
          "xdist", "tyro"]
print(*(name for name in needed if find_spec(name) is None))')
if [ -n "$missing" ]; then
    echo "gpu.sh needs packages that $python lacks, such as tools/gpu_wheels.sh fetches: $missing" >&2
    exit 1
fi
if [ -z "$rehearse" ]; then
    # such as "9.0 nvidia-h100-80gb-hbm3"
    device=$(PYTHONPATH=$PWD/benchmarks:$PYTHONPATH "$python" -c '
import torch, machine
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability(), machine.folder_name(torch.device("cuda")))')
    if [ -z "$device" ]; then
        echo "gpu.sh needs an NVIDIA GPU that torch can use, and found none" >&2
        exit 1
    fi
    export TORCH_CUDA_ARCH_LIST=${device% *} # of nvcc: no code for any other GPU
    out=${OUT:-benchmarks/results/${device#* }}
else
    out=$scratch/results
fi
mkdir -p "$out"
rm -f "$out/stderr.txt"
"$python" benchmarks/gpu_jobs.py $rehearse "${parts[@]}" >"$scratch/jobs"
if [ -n "$rehearse" ]; then
    "$python" benchmarks/gpu_jobs.py --estimate "${parts[@]}"
fi

run_job() { # part, file, seconds, command
    local begin=$SECONDS status=0 seconds=$(($3 * ${PATIENCE:-1})) how said=$scratch/${2}.said
    # the shell words of gpu_jobs.py; an interrupt lets a program say what it has so far
    eval "timeout --signal=INT --kill-after=10 $seconds \"\$python\" $4" >"$out/$2" 2>"$said" || status=$?
    case $status in
    0) how=done ;;
    124 | 137) how="cut off at its limit of $seconds s" ;;
    *) how="failed with $status" ;;
    esac
    printf '%s/%s\t%s in %s s\n' "$1" "$2" "$how" $((SECONDS - begin)) | tee -a "$scratch/ran"
    if [ $status != 0 ]; then
        printf ' %s/%s' "$1" "$2" >>"$scratch/failed"
        cat "$said" >>"$out/stderr.txt"
        tail -n 5 "$said" >&2
    fi
}

touch "$scratch/ran" "$scratch/failed"
while IFS=$'\t' read -r -u 3 part file seconds command; do
    # nothing is timed in a rehearsal, so two jobs run beside each other, but for the build, whose
    # kernels the others load; elsewhere a job has the device, and the interrupt, for itself
    if [ -n "$rehearse" ] && [ "$file" != build.txt ]; then
        while [ "$(jobs -rp | wc -l)" -ge 2 ]; do wait -n; done
        run_job "$part" "$file" "$seconds" "$command" 3<&- &
    else
        run_job "$part" "$file" "$seconds" "$command"
    fi
done 3<"$scratch/jobs"
wait
failed=$(cat "$scratch/failed")

"$python" benchmarks/gpu_table.py "$out" <"$scratch/ran" || failed="$failed table"
if [ -n "$rehearse" ]; then
    # what a run leaves is read as it is; a part that was not asked for has left nothing
    if compgen -G "$out/*.jsonl" >/dev/null; then
        "$python" tools/report.py "$out" --page "$scratch/report.html" >/dev/null || failed="$failed report"
    fi
fi
if [ -n "$failed" ]; then
    echo "Failed:$failed" >&2
    exit 1
fi
