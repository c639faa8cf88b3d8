#!/bin/sh
# Everything that needs a GPU, on a machine with Python, torch, jax and CuPy but no network.
#
#   benchmarks/gpu.sh wheels        where there is a network: fetch what such a machine lacks
#                                   (PYTHON_VERSION=3.12 for its Python)
#   benchmarks/gpu.sh --output DIR  on the machine: install that beside, and run `benchmarks gpu`
set -eu
cd "$(dirname "$0")/.."
WHEELS=.wheels
PYTHON=${PYTHON:-python3}

if [ "${1:-}" = wheels ]; then
    rm -rf "$WHEELS"
    "$PYTHON" -m pip download --quiet --no-deps --dest "$WHEELS" --only-binary=:all: \
        --python-version "${PYTHON_VERSION:-3.12}" --platform any --platform manylinux2014_x86_64 \
        array-api-compat array-api-strict hypergrad==0.0.1 jaxopt hypothesis sortedcontainers
    ls "$WHEELS"
    exit
fi

SITE=$(mktemp -d)
trap 'rm -rf "$SITE"' EXIT
"$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir \
    --target "$SITE" "$WHEELS"/*
export PYTHONPATH="$SITE:$PWD:$PWD/adapters" PYTHONUNBUFFERED=1
"$PYTHON" -m benchmarks gpu "$@"
