#!/usr/bin/env bash
# One call on a machine with a GPU, from a bare checkout: the kernels' tests compiled, then their times. Writes ${OUT:-.}/gpu.json.
#     bash bench/gpu.sh            PYTHON names the interpreter (default python3); what it lacks is installed from the registry if there is one
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON="${PYTHON:-python3}"
export PYTHONPATH="$PWD/src${PYTHONPATH:+:$PYTHONPATH}"
for package in torch triton numpy safetensors pytest; do
    "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$package') is None)" ||
        "$PYTHON" -m pip install --quiet "$package" || echo "could not install $package" >&2
done
exec "$PYTHON" bench/gpu.py "$@"
