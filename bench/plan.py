"""How fast a plan is compiled, written, opened and read: `python bench/plan.py [--json] [--sizes
1e4 1e5 1e6]`.

Exposures of 100 distinct tokens each, at random places of a 210-billion-token stream (the scale of
the run in arXiv:2509.23383). Every size runs in a process of its own; compile counts everything
from unit ids to sorted rows.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

STREAM_TOKENS, LENGTH, EXPOSURE_TOKENS, LOOKUPS = 210_000_000_000, 2048, 100, 100_000


def rss_mib() -> float:
    """Return this process's resident memory, MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def measure_compile(n: int, folder: Path) -> dict[str, float]:
    """Compile and write a plan of n exposures."""
    from motet.experiments.stream.exposure_plan import write_plan
    from motet.experiments.stream.placement import Request, Texts, compile_plan
    from motet.experiments.stream.random import text_keys

    tokens = np.random.default_rng(0).integers(1, 50_000, (n, EXPOSURE_TOKENS), dtype=np.uint16)
    ids = [f"unit-{number}" for number in range(n)]
    started = time.perf_counter()
    rows = np.arange(n, dtype=np.int32)
    request = Request(
        experiment="bench",
        unit_keys=text_keys(ids),
        unit=rows,
        repetition=np.zeros(n, dtype=np.int32),
        text=rows,
        first_slot=np.zeros(n, dtype=np.int64),
        last_slot=np.full(n, STREAM_TOKENS // LENGTH),
        texts=Texts(tokens.reshape(-1), np.arange(n + 1, dtype=np.int64) * EXPOSURE_TOKENS),
    )
    plan = compile_plan([request], seed=1, sequence_length=LENGTH)
    compile_s = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    started = time.perf_counter()
    write_plan(plan, folder / "exposures.plan")
    write_s = time.perf_counter() - started
    np.save(folder / "slots.npy", np.random.default_rng(1).choice(plan.rows.slot, LOOKUPS))
    return {"compile_s": compile_s, "compile_peak_mib": peak, "write_s": write_s}


def measure_reader(folder: Path) -> dict[str, float]:
    """Open a plan and look up slots that hold exposures, in random order; memory counts shared
    pages too.
    """
    from motet.experiments.stream.exposure_plan import ExposurePlan

    slots = np.load(folder / "slots.npy").tolist()
    before = rss_mib()
    started = time.perf_counter()
    plan = ExposurePlan(folder / "exposures.plan")
    open_ms = (time.perf_counter() - started) * 1e3
    started = time.perf_counter()
    found = sum(len(plan.lookup(slot)) for slot in slots)
    seconds = time.perf_counter() - started
    assert found >= LOOKUPS
    return {
        "open_ms": open_ms,
        "reader_rss_mib": rss_mib() - before,
        "hit_lookups_per_s": LOOKUPS / seconds,
    }


def in_process(stage: str, n: int, folder: str) -> dict[str, float]:
    """Run one stage in a fresh interpreter."""
    command = [sys.executable, __file__, "--stage", stage, "--sizes", str(n), "--folder", folder]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e4, 1e5, 1e6])
    parser.add_argument("--stage", choices=["compile", "reader"], help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        if arguments.stage == "compile":
            print(json.dumps(measure_compile(int(arguments.sizes[0]), arguments.folder)))
        else:
            print(json.dumps(measure_reader(arguments.folder)))
        return
    results = []
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            row: dict[str, float] = {"exposures": int(size)}
            row |= in_process("compile", int(size), folder)
            row |= in_process("reader", int(size), folder)
        results.append(row)
        if not arguments.json:
            print("  ".join(f"{key}={value:,.4g}" for key, value in row.items()), flush=True)
    if arguments.json:
        print(json.dumps(results))


if __name__ == "__main__":
    main()
