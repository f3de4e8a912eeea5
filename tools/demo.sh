#!/usr/bin/env bash
# Sets up what is missing and runs the demo; arguments go to tools/demo.py.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup.sh
PYTHONPATH=benchmarks exec .venv/bin/python tools/demo.py "$@"
