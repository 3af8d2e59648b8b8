"""Time of `motet status` and `motet ls` on a folder of 500 runs, each as a process of its own, and
their calls of Slurm.

    python bench/status.py [--runs 500] [--repeats 5] [--folder FOLDER] [--json]

A fifth of the runs each are finished, stopped, crashed, waiting in Slurm's queue, and training;
each has up to four attempts, every tenth 20,000 rows of metrics. `squeue`, `sbatch` and `sacct` are
stand-ins that answer at once and count how often they are called.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from motet.launcher.runs.rundir import RunDir

STEPS, SEQUENCES, LENGTH = 20_000, 64, 1024
MANY_ROWS, FEW_ROWS = 20_000, 400
KINDS = ("finished", "stopped", "crashed", "pending", "running")
MOST_S, MOST_CALLS = 2.0, 2
SLURM = """#!{python} -S
import os, sys
with open({calls!r}, "a") as stream:
    stream.write(os.path.basename(sys.argv[0]) + "\\n")
columns = [a[9:] for a in sys.argv if a.startswith("--Format=")]
ids = [a[7:].split(",") for a in sys.argv if a.startswith("--jobs=")]
for id_ in ids[0] if columns and ids else ():
    if int(id_) % {kinds} < {pending}:
        continue
    waits = int(id_) % {kinds} == {pending}
    values = {{"JobArrayID": id_, "State": "PENDING" if waits else "RUNNING", "Reason": "Priority" if waits else "None",
        "StartTime": "N/A" if waits else {start!r}, "EndTime": "N/A" if waits else {end!r}, "RestartCnt": "0"}}
    pairs = (column.split(":") for column in columns[0].split(","))
    print("".join(values.get(name, "x").ljust(int(width)) for name, width in pairs))
"""


def metrics_text(rows: int, now: float) -> str:
    """Return a metrics.jsonl of so many steps, as training writes it, with a probe and a checkpoint
    every 200.
    """
    lines = [
        '{"kind":"attempt","step":0,"time":%.3f,"attempt":1,"start_step":0}' % (now - 2 * rows)
    ]
    for step in range(1, rows + 1):
        moment = now - 2.0 * (rows - step)
        row: dict[str, Any] = {"kind": "step", "step": step, "time": round(moment, 3)}
        row |= {"loss": 11.0 - step / rows * 8, "z_loss": None, "balance_loss": None}
        row |= {"grad_norm": 0.4137261, "lr": 0.000312, "tokens": step * SEQUENCES * LENGTH}
        row |= {"tokens_per_s": 34_012.7219, "mfu": 0.3912, "memory_mib": 61_220.5}
        row |= {"seconds": {"data": 0.0003, "train": 1.9261}, "skipped": False, "why": ""}
        lines.append(json.dumps(row, separators=(",", ":")))
        if step % 200 == 0:
            means = {f"experiment-{i}": {"0": 3.1, "8": 2.9} for i in range(12)}
            probe = {"kind": "probe", "step": step, "time": moment, "experiments": means}
            lines.append(json.dumps(probe))
            lines.append(json.dumps({"kind": "checkpoint", "step": step, "time": moment}))
    return "\n".join(lines) + "\n"


def make_run(root: Path, index: int, texts: tuple[str, str], now: float) -> None:
    """Write one run folder."""
    run, kind, many = RunDir(root / f"run-{index:04d}"), KINDS[index % len(KINDS)], index % 10 == 0
    run.create()
    settings = f"name: {run.name}\nseed: 0\nmodel:\n" + "".join(
        f"  size_{i}: null\n" for i in range(60)
    )
    run.resolved_yaml.write_text(f"{settings}training:\n  steps: {STEPS}\n  tokens: null\n")
    experiments = [{"name": f"e{i}", "doses": [0, 1, 2, 4]} for i in range(12)]
    facts = {
        "name": run.name,
        "created": now - index,
        "parameters": 124_000_000,
        "sequence_length": LENGTH,
        "tokens_per_step": SEQUENCES * LENGTH,
        "config": {"batch": {"sequences": SEQUENCES, "ramp": []}, "experiments": experiments},
    }
    run.manifest.write_text(json.dumps(facts, indent=1))
    run.metrics.write_text(texts[0] if many else texts[1])
    for step in (200, 400):
        run.checkpoint(step).mkdir()
    attempts = 1 + index % 4
    for number in range(1, attempts + 1):
        run.attempt(number).mkdir()
        reason = (
            ("running" if kind in ("pending", "running") else kind)
            if number == attempts
            else "crashed"
        )
        write_attempt(run, number, reason, now)
    if kind == "finished":
        run.done.write_text(f"{STEPS}\n")
    if kind in ("pending", "running") or index % 2:
        run.job_files.mkdir()
        run.jobs_json.write_text(json.dumps([{"job_id": str(index + 10_000 * len(KINDS))}]))


def write_attempt(run: RunDir, number: int, reason: str, now: float) -> None:
    """Write what the ranks of one attempt leave."""
    ended = None if reason == "running" else now - 500
    told = {"attempt": number, "start_step": 0, "started": now - 3600, "ended": ended}
    told |= {"reason": reason, "world_size": 8, "segment": number}
    folder = run.attempt(number)
    (folder / "attempt.json").write_text(json.dumps(told))
    for rank in range(8):
        (folder / f"pid-{rank}").write_text(f"{4_000_000 + rank} node-{number}")
    if reason == "crashed":
        (folder / "crash-3.txt").write_text("Traceback ...\nRuntimeError: CUDA out of memory\n")


def make_slurm(folder: Path, calls: Path, now: float) -> None:
    """Write the stand-ins of Slurm's commands."""
    folder.mkdir()
    stamps = {
        name: time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(moment))
        for name, moment in (("start", now - 4000), ("end", now + 40_000))
    }
    text = SLURM.format(
        python=sys.executable,
        calls=str(calls),
        kinds=len(KINDS),
        pending=KINDS.index("pending"),
        **stamps,
    )
    for name in ("squeue", "sbatch", "sacct"):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)


def measure(root: Path, runs: int, repeats: int) -> dict[str, Any]:
    """Make the folder, then time both commands and count their calls."""
    now = time.time()
    texts = (metrics_text(MANY_ROWS, now), metrics_text(FEW_ROWS, now))
    for index in range(runs):
        make_run(root / "runs", index, texts, now)
    calls = root / "calls"
    make_slurm(root / "bin", calls, now)
    path = f"{root / 'bin'}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path}
    told: dict[str, Any] = {"runs": runs, "repeats": repeats}
    for command in ("status", "ls"):
        seconds, cpu_s, counts = [], [], []
        for _ in range(repeats):
            calls.write_text("")
            argv = [sys.executable, "-m", "motet.launcher.cli", command, "--json"]
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started_s = time.perf_counter()
            done = subprocess.run(
                argv, cwd=root, env=environment, capture_output=True, text=True, check=True
            )
            seconds.append(time.perf_counter() - started_s)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            cpu_s.append(used)
            counts.append(len(calls.read_text().splitlines()))
        states = [row["state"] for row in json.loads(done.stdout)["runs"]]
        told[command] = {
            "median_s": round(statistics.median(seconds), 3),
            "most_s": round(max(seconds), 3),
            "median_cpu_s": round(statistics.median(cpu_s), 3),
            "slurm_calls": max(counts),
            "states": {name: states.count(name) for name in sorted(set(states))},
        }
    return told


def main() -> int:
    """Measure and print; the exit code is 1 when a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=500)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where the runs are made (default: a temporary folder)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        told = measure(Path(folder), arguments.runs, arguments.repeats)
    if arguments.json:
        print(json.dumps(told))
    else:
        for command in ("status", "ls"):
            row = told[command]
            print(
                f"motet {command:<7} {row['median_s']:.2f} s (most {row['most_s']:.2f}; at most "
                f"{MOST_S:g}), "
                f"{row['median_cpu_s']:.2f} s of one core  "
                f"{row['slurm_calls']} calls of Slurm (at most {MOST_CALLS})  {row['states']}"
            )
    rows = [told["status"], told["ls"]]
    kept = all(row["median_s"] < MOST_S and row["slurm_calls"] <= MOST_CALLS for row in rows)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
