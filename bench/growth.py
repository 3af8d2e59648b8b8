"""How long does a model take to grow in CPU memory, optimizer state too, and how much memory?

The old model is held whole, with m, v and step; the new one is held whole as it comes. Everything
stands in fp32. A growth is timed without the making of the old model.

With `--ranks N` it goes from one engine to another, both divided over N processes by FSDP2, as in a
run: seconds, and what a process holds at most beside its parts of both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import replace

import torch

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig, preset
from motet.models.counts import parameters
from motet.models.growth.growth import grow
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState, fresh
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import join, leave

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


def grown(source: ModelConfig, name: str) -> ModelConfig:
    """Return the model that an operator makes: four times the layers, or twice the width."""
    return replace(source, n_layers=4 * source.n_layers) if name == "stack" else twice(source)


def held_bytes() -> int:
    """Return what this process holds now."""
    with open("/proc/self/statm") as pages:
        return int(pages.read().split()[1]) * resource.getpagesize()


def sharded(source: ModelConfig, name: str, ranks: int) -> dict[str, float]:
    """Grow between two engines; return what the worst rank took (called by each)."""
    target, world, layout = grown(source, name), join("cpu"), Layout(dp_shard=ranks)
    old = build_engine(source, EngineOptions(), layout, world)
    new = build_engine(target, EngineOptions(), layout, world)
    growth = operator(name, moments="keep").growth(source, target)
    begin, cpu = time.perf_counter(), time.process_time()
    new.import_state(grow(growth, old.export_state()))
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    # All pages of both states are in use now, which those of moments were not before.
    beside = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - held_bytes()
    worst = torch.tensor([seconds, cpu, float(beside)], dtype=torch.float64)
    torch.distributed.all_reduce(worst, op=torch.distributed.ReduceOp.MAX, group=world.control)
    leave()
    largest = max(torch.Size(weight.shape).numel() for weight in named_weights(target))
    state = BYTES * parameters(target)
    return {
        "ranks": ranks,
        "source_parameters": parameters(source),
        "target_parameters": parameters(target),
        "seconds": round(float(worst[0]), 2),
        "cpu_seconds": round(float(worst[1]), 2),
        "beside_both_parts_gib": round(float(worst[2]) / 2**30, 3),
        "beside_both_over_target_state": round(float(worst[2]) / state, 3),
        "largest_tensor_with_moments_gib": round(BYTES * largest / 2**30, 3),
    }


def timed(source: ModelConfig, name: str) -> dict[str, float]:
    """Grow once; return seconds and bytes."""
    target = grown(source, name)
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
    parser.add_argument("--ranks", type=int, default=0, help="0: no engine, one process")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.ranks and "RANK" not in os.environ:
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1"]
        number = f"--nproc-per-node={arguments.ranks}"
        raise SystemExit(subprocess.run([*start, number, *sys.argv]).returncode)
    torch.set_num_threads(arguments.threads)
    source = preset(arguments.preset, VOCABULARY)
    if arguments.ranks:
        result = sharded(source, arguments.operator, arguments.ranks)
        if int(os.environ["RANK"]):
            return
    else:
        result = timed(source, arguments.operator)
    if arguments.json:
        print(json.dumps({"preset": arguments.preset, "operator": arguments.operator, **result}))
        return
    for key, value in result.items():
        print(f"{key:40} {value:,}")


if __name__ == "__main__":
    main()
