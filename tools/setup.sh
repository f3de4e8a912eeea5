#!/usr/bin/env bash
# Makes .venv in the checkout when it is not there, or when what it must hold has changed.
# Sourced by demo.sh and test.sh, which have moved to the checkout's root.
set -euo pipefail

python=${PYTHON:-python3}
# torch 2.13.0 exactly where there is no GPU: a range would pull several GB of CUDA packages
if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi >/dev/null 2>&1; then
    torch=torch
else
    torch=torch==2.13.0
fi

stamp=.venv/.dbkernels-installed
wanted="$torch $(cat pyproject.toml setup.py tools/setup.sh dbkernels/ops/backend/toolchain.py csrc/* | cksum)"
if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
        echo "dbkernels needs Python 3.10 or newer, got $("$python" --version 2>&1)" >&2
        exit 1
    }
    if [ ! -x .venv/bin/python ]; then
        echo "Making .venv ..."
        "$python" -m venv .venv || {
            echo "python3 cannot make a virtual environment; on Debian: apt install python3-venv" >&2
            rm -rf .venv
            exit 1
        }
    fi
    echo "Installing $torch and what else is missing into .venv (once; a few minutes) ..."
    install=(.venv/bin/python -m pip install --quiet --disable-pip-version-check)
    # csrc is built against the torch that is there, and so without a build environment of its own
    "${install[@]}" "$torch" 'setuptools>=77' ninja
    "${install[@]}" --no-build-isolation --editable '.[test]'
    # pip keeps to itself what the build had to leave out
    cat dbkernels/ops/libdbkernels.txt
    echo "$wanted" >"$stamp"
fi
