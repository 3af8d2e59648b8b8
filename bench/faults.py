"""Faults of a cluster on the real testbed, and how long a run takes to train again.

    python bench/faults.py [--rounds 3] [--faults requeue cut ...] [--step-s 0.2] [--json]

A run of two nodes is submitted to a testbed of its own (see docs/testbed.md; needs root and
slurm-wlm) and hit with one fault after the other, each once per round; preemption and a cut cable
also hit a heterogeneous job over both clusters. Told are the seconds from the fault to the first
new step in the run's record, the steps that were trained again, and the attempts that it took. At
the end the runs are cancelled, and `motet experiments audit` judges them.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests of the same faults have the tools

from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import slurm
from tests.slurm.fault_runs import (
    HELPER,
    INTERVAL,
    RANK,
    TORCHRUN,
    FaultRun,
    bring_limit_near,
    left_of_jobs,
    preempt,
    rows_since,
    write_run,
)
from tests.slurm.jobs import motet as on_bed
from tests.system.runs import motet, rows

ENDLESS = ["training.steps=100000", "training.max_restarts=1000", "slurm.max_requeues=1000"]
TOGETHER = "slurm.groups=[{nodes: 1, constraint: ib}, {nodes: 1, constraint: eth}]"
ONE_KIND, TWO_KINDS = ("slurm.nodes=2",), (TOGETHER,)


@dataclass(frozen=True)
class Hit:
    """One fault.

    Attributes:
        seconds: from the fault to the first new step; for the time limit, from Slurm's signal.
        steps_lost: trained again; attempts: that came of it.
    """

    fault: str
    seconds: float
    steps_lost: int
    attempts: int


def _head(one: FaultRun) -> str:
    return one.people(HELPER)[0].host


def cut(one: FaultRun) -> None:
    """Pull the cable of the first node."""
    one.bed.cut(_head(one))


def crash(one: FaultRun) -> None:
    """Kill everything on the second node."""
    one.bed.crash(one.people(HELPER)[1].host)


FAULTS: dict[str, tuple[Callable[[FaultRun], object], Sequence[str]]] = {
    "kill -9 of a rank": (lambda one: one.kill(RANK, 1), ONE_KIND),
    "kill -9 of torchrun": (lambda one: one.kill(TORCHRUN), ONE_KIND),
    "kill -9 of the node helper": (lambda one: one.kill(HELPER, 1), ONE_KIND),
    "scontrol requeue": (lambda one: slurm(one.bed, "scontrol", "requeue", one.job_id), ONE_KIND),
    "controller restarted": (lambda one: one.bed.restart_controller(), ONE_KIND),
    "preempted": (lambda one: preempt(one.bed, one.run.root), ONE_KIND),
    "time limit": (lambda one: bring_limit_near(one.bed, one.job_id), ONE_KIND),
    "node crashed": (crash, ONE_KIND),
    "cable of the first node cut": (cut, ONE_KIND),
    "preempted, heterogeneous": (lambda one: preempt(one.bed, one.run.root), TWO_KINDS),
    "cable of the first node cut, heterogeneous": (cut, TWO_KINDS),
}


def hit(one: FaultRun, fault: str) -> Hit:
    """Let one fault happen between two checkpoints, and wait until the run trains again."""
    begun = one.step()
    one.until(lambda: one.step() > begun + INTERVAL and one.step() % INTERVAL >= 5, "it trains")
    known = len(rows(one.run.root, "attempt"))
    began = time.time()
    FAULTS[fault][0](one)
    if fault == "controller restarted":
        one.until_step(one.step() + 2)
        after = [row["time"] for row in rows(one.run.root, "step") if row["time"] > began]
        return Hit(fault, after[0] - began, 0, 0)
    one.until(lambda: one.trains_again(known), f"it trains again after: {fault}")
    if fault == "time limit":
        slurm(one.bed, "scontrol", "update", f"jobid={one.job_id}", "TimeLimit=60")
        began = max(row["time"] for row in rows_since(one.run, known - 1, known))
    first = next(row for row in rows_since(one.run, known) if row["kind"] == "step")
    mend(one.bed)
    attempts = len(rows(one.run.root, "attempt"))
    lost = sum(one.steps_lost(number) for number in range(known + 1, attempts + 1))
    return Hit(fault, first["time"] - began, lost, attempts - known)


def mend(bed: Testbed) -> None:
    """Mend the nodes that are broken."""
    for node, state in bed.node_states().items():
        if state.startswith("down") or state.endswith("*") or node not in bed.pids():
            bed.mend(node)


def audit(one: FaultRun) -> bool:
    """Stop a run for good; whether every exposure was consumed once."""
    stopped = on_bed(one.bed, "cancel", str(one.run.root))
    if stopped.returncode:
        raise RuntimeError(stopped.stderr)
    one.until(lambda: not left_of_jobs(one.bed), "nobody is left on the nodes")
    return motet("experiments", "audit", str(one.run.root)).returncode == 0


def measure(
    bed: Testbed, folder: Path, faults: Sequence[str], rounds: int, step_s: float
) -> dict[str, Any]:
    """Hit a run of each kind with the faults that are meant for it."""
    corpus = folder / "corpus"
    text = Path(sysconfig.get_paths()["stdlib"]) / "json"
    made = motet("data", "prepare", str(text), "--output", str(corpus), "--vocabulary-size", "512")
    if made.returncode:
        raise RuntimeError(made.stderr)
    hits: list[Hit] = []
    audits = []
    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("faults", total=rounds * len(faults))
        for kind, name in ((ONE_KIND, "plain"), (TWO_KINDS, "heterogeneous")):
            mine = [fault for fault in faults if FAULTS[fault][1] is kind]
            if not mine:
                continue
            yaml = write_run(folder, corpus, name)
            settings = [*ENDLESS, *kind, "slurm.time=60", "slurm.signal_s=30"]
            one = FaultRun.submitted(bed, yaml, *settings, pace_s=step_s)
            for fault in mine * rounds:
                bar.update(task, description=fault)
                hits.append(hit(one, fault))
                bar.console.print(hits[-1])
                bar.advance(task)
            audits.append(audit(one))
    load = os.getloadavg()[1]
    return {"hits": [asdict(one) for one in hits], "audits": audits, "load_5_min": load}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--faults", nargs="+", choices=list(FAULTS), default=list(FAULTS))
    parser.add_argument("--step-s", type=float, default=0.2, help="how long a step waits")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="motet-faults-") as name:
        bed = Testbed(Path(name) / "bed")
        bed.start()
        try:
            found = measure(bed, Path(name), arguments.faults, arguments.rounds, arguments.step_s)
        finally:
            bed.stop()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0 if all(found["audits"]) else 1
    print("| fault | first new step after, s (median; most) | steps lost, most | attempts, most |")
    print("|---|---|---|---|")
    for fault in arguments.faults:
        mine = [one for one in found["hits"] if one["fault"] == fault]
        seconds = [one["seconds"] for one in mine]
        lost, tries = max(h["steps_lost"] for h in mine), max(h["attempts"] for h in mine)
        print(
            f"| {fault} | {statistics.median(seconds):.1f}; {max(seconds):.1f} | {lost} | {tries} |"
        )
    print(f"audits: {found['audits']}; load of the machine: {found['load_5_min']:.1f}")
    return 0 if all(found["audits"]) else 1


if __name__ == "__main__":
    sys.exit(main())
