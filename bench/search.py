"""How long a complete search takes, and how much memory: `python bench/search.py [--json] [--only
NAME]`.

Each case runs in a process of its own on one core: 8 GPUs and a 7B model; 16,384 GPUs in three
unequal clusters with a dense model of 405B, and with a mixture of 671B (the shapes of Llama 3.1,
arXiv:2407.21783, and of DeepSeek-V3, arXiv:2412.19437, with plain attention); the same with a
mixture of 671B whose every second layer has experts, twice as many. `--seconds` ends each search
early, as `motet plan --seconds` does: then the gap counts. The last case, which is not proven in
minutes, ends after 10 s unless told otherwise.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import sys
import time
from dataclasses import replace
from typing import Any

from motet.models.config import ModelConfig
from motet.models.counts import parameters
from motet.parallel.cluster.description import (
    Cluster,
    Group,
    Link,
    builtin_link,
    device,
    homogeneous,
)
from motet.parallel.cost.terms import Training
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import PlanQuestion
from motet.parallel.planner.space import Limits

TARGETS = {
    "8": (0.3, 1024),
    "405b": (10.0, 1024),
    "671b": (10.0, 1024),
    "alternating": (20.0, 2048),
}
"""Seconds, MiB."""

SECONDS = {"alternating": 10.0}
"""Where a search is ended that would take minutes to its proof."""


def three_clusters() -> Cluster:
    """8,192 H100, 6,144 A100 and 2,048 H200: three halls with slow links between them."""
    halls = (
        ("h100", 1024, "nvlink4", 50.0, "infiniband"),
        ("a100-80", 768, "nvlink3", 25.0, "roce"),
        ("h200", 256, "nvlink4", 50.0, "infiniband"),
    )
    groups = tuple(
        Group(kind, device(kind), nodes, 8, builtin_link(inside), Link(rate, 5.0, network))
        for kind, nodes, inside, rate, network in halls
    )
    slow = Link(400.0, 500.0, "ethernet")
    pairs = {("a100-80", "h100"): slow, ("h100", "h200"): slow, ("a100-80", "h200"): slow}
    return Cluster(groups, pairs)


DENSE_7B = ModelConfig(32_768, 4096, 32, 32, 8, 14_336)
DENSE_405B = ModelConfig(128_256, 16_384, 126, 128, 8, 53_248)
MIXTURE_671B = ModelConfig(
    129_280,
    7168,
    61,
    128,
    128,
    18_432,
    head_dim=128,
    n_experts=256,
    experts_per_token=8,
    d_expert=2048,
    n_shared_experts=1,
    n_dense_layers=3,
)


ALTERNATING_671B = replace(MIXTURE_671B, n_experts=512, n_dense_layers=0, moe_every=2)


def question(name: str, seconds: float | None = None) -> PlanQuestion:
    """Return the question of a case."""
    return replace(_question(name), limits=Limits(seconds=seconds or SECONDS.get(name)))


def _question(name: str) -> PlanQuestion:
    if name == "8":
        engines = ("native", "deepspeed")
        return PlanQuestion(DENSE_7B, homogeneous("h100", 1), Training(256, 4096), engines)
    if name == "405b":
        return PlanQuestion(DENSE_405B, three_clusters(), Training(2048, 8192))
    if name == "alternating":
        return PlanQuestion(ALTERNATING_671B, three_clusters(), Training(16_384, 4096))
    return PlanQuestion(MIXTURE_671B, three_clusters(), Training(16_384, 4096))


def measure(name: str, seconds: float | None = None) -> dict[str, Any]:
    """Return what one case took and found."""
    asked = question(name, seconds)
    start_s = time.process_time()
    answer = plan(asked)
    took_s = time.process_time() - start_s
    scale = 2**20 if sys.platform == "darwin" else 2**10
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    best = answer.best
    layout = best.layout
    return {
        "case": name,
        "parameters": parameters(asked.model),
        "devices": asked.cluster.devices,
        "seconds": round(took_s, 3),
        "peak_mib": round(peak_mib),
        "target_s": TARGETS[name][0],
        "counts": dict(answer.counts),
        "step_time_s": best.prediction.step_time_s,
        "gap": answer.gap,
        "memory_gib": best.prediction.memory_gib,
        "degrees": {
            key: getattr(layout, key)
            for key in ("tp", "pp", "cp", "ep", "etp", "dp_replicate", "dp_shard")
        },
        "micro_sequences": layout.micro_sequences,
        "schedule": [layout.schedule, layout.virtual_stages, layout.recompute],
        "groups": [(group.name, group.devices) for group in best.cluster.groups],
        "blocks": best.spread.blocks,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", choices=tuple(TARGETS))
    parser.add_argument("--seconds", type=float)
    arguments = parser.parse_args()
    names = [arguments.only] if arguments.only else list(TARGETS)
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in names:
        with context.Pool(1) as pool:
            rows.append(pool.apply(measure, (name, arguments.seconds)))
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    for row in rows:
        took = f"{row['seconds']:.2f} s (target {row['target_s']:g}), {row['peak_mib']:,} MiB"
        print(f"{row['case']:>11}: {row['devices']:,} devices, {took}; {row['counts']}")
        shown = " ".join(f"{k} {v}" for k, v in row["degrees"].items() if v > 1)
        proof = f"at most {row['gap']:.1%} from the best" if row["gap"] else "proven"
        print(
            f"             {row['step_time_s']:.3f} s ({proof}): {shown}; {row['schedule']} on "
            f"{row['blocks']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
