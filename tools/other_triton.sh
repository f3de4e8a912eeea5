#!/usr/bin/env bash
# The report on kernels as another release of Triton compiles them, such as the one of a GPU machine:
#
#   bash tools/other_triton.sh VERSION [options of kernel_report.py]
#
# The release goes to a folder of its own in .venv. Where it cannot be had, one sentence says so.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

version=$1
folder=.venv/triton-$version
if [ ! -f "$folder/complete" ]; then
    rm -rf "$folder"
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
        --target "$folder" "triton==$version" 2>"$folder.log"; then
        echo "Triton $version cannot be had here, so no kernel was compiled with it: see $folder.log"
        exit 0
    fi
    touch "$folder/complete"
fi
PYTHONPATH=$folder exec .venv/bin/python tools/kernel_report.py "${@:2}"
