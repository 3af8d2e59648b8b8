#!/usr/bin/env bash
# One GPU: families and operators of growth against training from scratch, at 19 to 154 million parameters
# (bench/progressive.py --scale gpu says what is measured).
#
#   bench/gpu_family.sh [--text FILE] [--json] [--seeds 1] [--budget-s 540] ...   options as in bench/progressive.py
#   bench/gpu_family.sh --tiny                                                    every arm, a few steps each, on the CPU
#
# No arm begins after --budget-s seconds; arms that ended are kept in bench/results/progressive_gpu.json and are not trained
# again, so that a second call goes on. Nothing needs to be installed beside torch, numpy, scipy and omegaconf: Motet is read
# from this checkout, with the torch of $PYTHON (python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH="$PWD/.src${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

arguments=(--scale gpu --device cuda --seeds 1 --budget-s 540)
for argument in "$@"; do
    if [[ $argument == --tiny ]]; then
        arguments+=(--scale tiny --device cpu)
    else
        arguments+=("$argument")
    fi
done
"$python" bench/progressive.py "${arguments[@]}"
