#!/usr/bin/env bash
# One GPU: Motet against Trainer and a bare loop (bench/gpu.py says what is measured).
#
#   bench/gpu.sh [--json] [--lengths 2048] [--rounds 2] ...   about 10 minutes on an H200; options as in bench/gpu.py
#   bench/gpu.sh --tiny                                       the same flow with a tiny model on the CPU
#
# Nothing needs to be installed: Motet is read from this checkout, with the torch of $PYTHON (python3). Where numpy, transformers or
# accelerate are missing and there is no network, put wheels for that Python into a folder and name it in $WHEELS (wheels/):
#   pip download --only-binary=:all: --python-version 3.12 --platform manylinux_2_28_x86_64 -d wheels transformers accelerate
# (accelerate brings wheels of torch, triton and nvidia along: leave them at home).
# Only what is missing is installed, into that Python's environment, and its torch stays as it is: it fits the driver.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
wheels=${WHEELS:-wheels}
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1 TOKENIZERS_PARALLELISM=false

missing() {
    "$python" -c 'import importlib.util as u; print(*[n for n in ("numpy", "transformers", "accelerate") if u.find_spec(n) is None])'
}
lacking=$(missing)
if [[ -n $lacking && -d $wheels ]]; then
    torch=$("$python" -c 'import torch; print(torch.__version__)')
    # shellcheck disable=SC2086
    "$python" -m pip install -q --no-index --find-links "$wheels" --constraint <(echo "torch==$torch") $lacking
    lacking=$(missing)
fi
if [[ -n $lacking ]]; then
    echo "bench/gpu.sh: $python lacks $lacking, and $wheels/ has no wheels of it; without transformers and accelerate leave out the arm hf: --arms attention motet bare" >&2
fi

arguments=()
for argument in "$@"; do
    if [[ $argument == --tiny ]]; then
        arguments+=(--preset 1m --vocabulary 512 --lengths 256 --tokens 512 --steps 3 --warmup 1 --device cpu --budget-s 900)
    else
        arguments+=("$argument")
    fi
done
"$python" bench/gpu.py "${arguments[@]}"
