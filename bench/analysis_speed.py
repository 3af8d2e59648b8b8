"""How long do 10,000 units under 10,000 repeated assignments take, and how much memory?

Every design runs in a process of its own: the repeated assignment, then outcomes one after the
other (they share the draws). `--peer` also times, at `--peer-draws`, the computation that 0.1.0
used: treatment scores of every draw residualized by a dense matrix of blocks.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

Array = np.ndarray
FIVE = 5


def dense(y: Array, arms: Array, blocks: Array, draws: Array) -> float:
    """The p-value by a dense orthonormal matrix of block indicators, one unit per cluster."""
    basis = (blocks[:, None] == np.arange(blocks.max() + 1)).astype(np.float64)
    basis /= np.sqrt(basis.sum(axis=0))

    def residual(x: Array) -> Array:
        return x - (x @ basis) @ basis.T

    y = residual(y)

    def squared_t(scores: Array) -> Array:
        z = residual(scores)
        along, square = z * y, z * z
        m = square.sum(axis=1)
        rest = along - (along.sum(axis=1) / m)[:, None] * square
        return along.sum(axis=1) ** 2 / np.einsum("du,du->d", rest, rest)

    step = max(1, (1 << 16) // len(y))
    found = [squared_t(draws[i : i + step].astype(float)) for i in range(0, len(draws), step)]
    reference = squared_t(arms[None].astype(float))[0]
    as_extreme = np.concatenate(found) >= reference * (1 - 1e-9)
    return float((1 + as_extreme.sum()) / (1 + len(draws)))


def measure(units: int, blocks: int, draws: int, peer_draws: int) -> dict[str, Any]:
    from motet.experiments.analysis.estimates import estimate
    from motet.experiments.analysis.omnibus import omnibus
    from motet.experiments.analysis.randomization import Repeater
    from motet.experiments.design.assignment import Design, assign

    rng = np.random.default_rng(0)
    keys = np.sort(rng.integers(0, 2**64, size=units, dtype=np.uint64))
    design = Design(rng.permutation(units), np.arange(units) % blocks, keys, (1, 1))
    y = rng.normal(size=units)
    before = y + rng.normal(size=units)
    score = np.array([0.0, 1.0])
    estimate(y[:40], None, Repeater(_first(design, 40), assign(design, 1)[:40], 1, 99).whole(score))
    result: dict[str, Any] = {"units": units, "blocks": blocks, "draws": draws}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        found = work()
        result[name] = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
        return found

    repeater = Repeater(design, assign(design, 3), 7, draws)
    comparison = timed("assignments", lambda: repeater.whole(score))
    timed("outcome", lambda: estimate(y, None, comparison))
    timed("outcome, with a covariate", lambda: estimate(y, before, comparison))
    holes = np.where(np.arange(units) % 97 == 0, np.nan, y)
    timed("outcome, with missing values", lambda: estimate(holes, before, comparison))
    arms = replace(design, weights=(1,) * FIVE)
    five = Repeater(arms, assign(arms, 3), 7, draws // 5).whole(np.arange(FIVE) * 1.0)
    timed(f"all {FIVE} arms at once, {draws // 5:,} draws", lambda: omnibus(y, before, five))
    result["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if peer_draws:
        few = Repeater(design, repeater.arms_U, 7, peer_draws).whole(score)
        ours = timed("peer's size, here", lambda: estimate(y, None, few)).p
        theirs = timed("peer's size, dense", lambda: dense(y, few.arms, few.blocks, few.draws))
        assert ours == theirs, (ours, theirs)
        ratio = result["peer's size, dense"]["cpu_s"] / result["peer's size, here"]["cpu_s"]
        result |= {"peer_draws": peer_draws, "ratio": ratio}
    return result


def _first(design: Any, n: int) -> Any:
    """A design of n units in one block, to load modules with."""
    cluster = np.arange(n)
    zeros = np.zeros(n, np.int64)
    return replace(
        design,
        cluster_of_unit=cluster,
        block_of_cluster=zeros,
        cluster_keys=design.cluster_keys[:n],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--units", type=int, default=10_000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 2500])
    parser.add_argument("--draws", type=int, default=10_000)
    parser.add_argument("--peer-draws", type=int, default=500, help="0: no peer")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows = []
    for blocks in options.blocks:
        arguments = (options.units, blocks, options.draws, options.peer_draws)
        code = f"import json, analysis_speed as a; print(json.dumps(a.measure{arguments}))"
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=__file__.rpartition("/")[0] or ".",
            capture_output=True,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout))
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    for row in rows:
        print(f"{row['units']:,} units, {row['blocks']:,} blocks, {row['draws']:,} draws")
        for name, value in row.items():
            if isinstance(value, dict):
                print(f"  {name:30} {value['wall_s']:7.2f} s wall {value['cpu_s']:7.2f} s CPU")
        print(f"  {'peak memory':30} {row['peak_mib']:7.0f} MiB")
        if "ratio" in row:
            print(f"  dense takes {row['ratio']:.1f} times as long at {row['peer_draws']} draws")


if __name__ == "__main__":
    main()
