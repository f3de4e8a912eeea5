#!/usr/bin/env bash
# Fetches into .whl what a GPU machine of CPython 3.12 on x86-64 Linux lacks, for tools/gpu.sh to
# install there without a network: tyro and its own needs. Run it here, where pip has a network.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
# --no-deps: each is named, so that none is brought that the machine has
wheels=(tyro docstring-parser typeguard)
platforms=(manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)

rm -rf .whl
"$python" -m pip download --quiet --disable-pip-version-check --no-deps --only-binary=:all: \
    --python-version 3.12 --implementation cp "${platforms[@]/#/--platform=}" --dest .whl "${wheels[@]}"
ls .whl
