"""How long does a model take to grow in CPU memory, optimizer state too, and how much memory?

The old model is held whole, with m, v and step; the new one is held whole as it comes. Everything
stands in fp32. A growth is timed without the making of the old model.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import replace

import torch

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig, preset
from motet.models.counts import parameters
from motet.models.growth.growth import grow
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState, fresh

VOCABULARY = 32_768
BYTES = 12  # of a parameter with m and v, fp32


def twice(config: ModelConfig) -> ModelConfig:
    """Return a model of twice the width: about four times the parameters of a block."""
    heads = {"n_heads": 2 * config.n_heads, "n_kv_heads": 2 * config.n_kv_heads}
    return replace(
        config,
        d_model=2 * config.d_model,
        d_ffn=2 * config.d_ffn,
        head_dim=config.head_width,
        **heads,
    )


def states(config: ModelConfig) -> dict[str, WeightState]:
    """Return an old model of numbers that are not zero: untouched pages would take no memory."""
    found = {}
    for at, weight in enumerate(named_weights(config)):
        state = fresh(torch.full(weight.shape, 0.01 * (at + 1)))
        found[weight.name] = {key: value + 0.01 for key, value in state.items()}
    return found


def timed(source: ModelConfig, name: str) -> dict[str, float]:
    """Grow once; return seconds and bytes."""
    target = replace(source, n_layers=4 * source.n_layers) if name == "stack" else twice(source)
    growth = operator(name, moments="keep").growth(source, target)
    old = states(source)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    begin, cpu = time.perf_counter(), time.process_time()
    new = dict(grow(growth, old.items()))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    held = sum(value.nbytes for state in new.values() for value in state.values())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "source_parameters": parameters(source),
        "target_parameters": parameters(target),
        "seconds": round(seconds, 2),
        "cpu_seconds": round(cpu, 2),
        "target_parameters_per_cpu_second": round(parameters(target) / cpu),
        "peak_over_target_state": round(peak / (BYTES * parameters(target)), 3),
        "beside_old_and_new_over_target_state": round((peak - before - held) / held, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--operator", default="hypercloning")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    result = timed(preset(arguments.preset, VOCABULARY), arguments.operator)
    if arguments.json:
        print(json.dumps({"preset": arguments.preset, "operator": arguments.operator, **result}))
        return
    for key, value in result.items():
        print(f"{key:40} {value:,}")


if __name__ == "__main__":
    main()
