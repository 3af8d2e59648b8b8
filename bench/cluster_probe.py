"""Does `motet cluster probe` find what a link really carries? A testbed of two clusters, its link
shaped to known rates.

    sudo python bench/cluster_probe.py [--rates 50 200 1000] [--folder F] [--json]

Four nodes in network namespaces on one machine, two on either side of a link with a token bucket
(tc-tbf). Each rate is probed without being told the groups; the error is of the rate of all devices
together, against what the link is shaped to. Every node's processes share this machine's cores, so
products and copies say little here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from motet.slurm.testbed.bed import Testbed

WITHIN = 0.15
TIMEOUT_S = 240.0
PORT = 29_710


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rates", type=float, nargs="+", default=[50.0, 200.0, 1000.0])
    parser.add_argument("--folder", default="/var/lib/motet-probe-bench", help="of the testbed")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    bed = Testbed(Path(arguments.folder))
    bed.start()
    try:
        rows = [measured(bed, rate, PORT + i) for i, rate in enumerate(arguments.rates)]
    finally:
        bed.stop()
    if arguments.json:
        print(json.dumps(rows, indent=1))
    else:
        for row in rows:
            print("  ".join(f"{name}={value}" for name, value in row.items()))
    return 0 if all(abs(row["error"]) <= WITHIN for row in rows) else 1


def measured(bed: Testbed, rate_mbit: float, port: int) -> dict[str, Any]:
    """Shape the link, probe from all nodes, and compare."""
    bed.set_rate(rate_mbit)
    started = time.monotonic()
    found = probe(bed, port)
    wall_s = time.monotonic() - started
    (link,) = found["cluster"]["links"]
    alone = next(one for one in found["links"] if one["scope"] == "between_alone")
    mbit = link["gb_s"] * 8e3
    return {
        "rate_mbit": rate_mbit,
        "measured_mbit": round(mbit, 1),
        "error": round(mbit / rate_mbit - 1, 4),
        "alone_mbit": round(alone["gb_s"] * 8e3, 1),
        "latency_us": link["latency_us"],
        "groups": list(found["groups"].values()),
        "measuring_s": round(found["seconds"], 1),
        "wall_s": round(wall_s, 1),
    }


def probe(bed: Testbed, port: int, *options: str) -> dict[str, Any]:
    """Run `motet cluster probe` on every node of a testbed and return what the first tells as
    JSON.
    """
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "motet.launcher.cli", "cluster", "probe", "--device", "cpu"]
        words += ["--json", "--output", f"{folder}/cluster.yaml", "--wait", "60", *options]
        words += ["--nnodes", str(len(bed.nodes)), "--endpoint", f"{bed.nodes[0]}:{port}"]
        running = [
            subprocess.Popen(
                [*bed.enter(node), *words, "--node-rank", str(rank)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
            for rank, node in enumerate(bed.nodes)
        ]
        try:
            told = [process.communicate(timeout=TIMEOUT_S) for process in running]
        finally:
            for process in running:
                process.terminate()
        for process, (_, errors) in zip(running, told, strict=True):
            if process.returncode:
                raise RuntimeError(f"the probe ended with {process.returncode}: {errors}")
    return dict(json.loads(told[0][0]))


if __name__ == "__main__":
    sys.exit(main())
