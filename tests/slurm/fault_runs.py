"""Runs on the testbed that something goes wrong with, and what must hold of them at the end.

Used by tests and `bench/faults.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.files import atomic_write
from motet.launcher.runs.metrics import read_metrics
from motet.launcher.runs.rundir import RunDir
from motet.slurm.testbed.bed import Testbed
from motet.slurm.testbed.processes import Inhabitant, wait_for
from tests.launcher.rank.test_wandb_mirror import history, of_type, records
from tests.slurm.bed_fixture import job_field, slurm
from tests.slurm.jobs import output, submit
from tests.system.runs import motet, newest_step, rows

STEPS, INTERVAL = 60, 10
SLOW_S = 0.3
WAIT_S = 180.0
RUN_YAML = """
name: {name}
seed: 3
model: {{preset: 1m, d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, d_ffn: 64, head_dim: 16}}
data: {{sequence_length: 256, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 8}}
training: {{steps: {steps}, precision: fp32, schedule: {{warmup_steps: 4}}, hooks: ['pace.py:Pace']}}
checkpoint: {{every_steps: {interval}}}
probes: {{every: 0.5}}
metrics: {{wandb: offline}}
layout: {{processes: {processes}, device: cpu, micro_sequences: 2}}
slurm: {{time: 10, partition: low}}
experiments:
  draws: 100
  list:
    - {{name: canaries, use: memorization, doses: [0, 2], generate: {{count: 12}}, options: {{n_references: 3}}}}
    - {{name: aa, use: placebo, generate: {{count: 10}}}}
"""
PACE = """
import time
from pathlib import Path
from motet import Hook, HookContext

class Pace(Hook):
    def before_step(self, context: HookContext) -> None:
        file = Path(context.settings.runs) / context.settings.name / "pace_s"
        if file.exists():
            time.sleep(float(file.read_text()))
"""
RANK, TORCHRUN, HELPER = (
    "motet.launcher.worker",
    "torch.distributed.run",
    "motet.launcher.node",
)


def write_run(folder: Path, corpus: Path, name: str, processes: int = 1) -> Path:
    """Write the run.yaml of a run with so many processes per node; its runs go to FOLDER/runs."""
    path = folder / f"{name}.yaml"
    (folder / "pace.py").write_text(PACE)
    facts = {"steps": STEPS, "interval": INTERVAL, "processes": processes}
    path.write_text(RUN_YAML.format(name=name, corpus=corpus, **facts))
    return path


class FaultRun:
    """A run whose job was submitted to the testbed, with steps slow enough to be hit in the
    middle.
    """

    def __init__(self, bed: Testbed, root: Path, job_id: str, pace_s: float = SLOW_S) -> None:
        self.bed, self.run, self.job_id = bed, RunDir(root), job_id
        self.pace(pace_s)

    @classmethod
    def submitted(
        cls, bed: Testbed, yaml: Path, *settings: str, pace_s: float = SLOW_S
    ) -> FaultRun:
        """Submit the run of a YAML; it is slowed before the job has started Python."""
        job_id = cls.submit(bed, yaml, *settings)
        return cls(bed, yaml.parent / "runs" / yaml.stem, job_id, pace_s)

    @staticmethod
    def submit(bed: Testbed, yaml: Path, *settings: str) -> str:
        """Submit a run, or the runs of an array; return the job's id."""
        return submit(bed, yaml, *settings)[1]

    def pace(self, seconds: float) -> None:
        """Let every step from now on wait so long before it begins."""
        atomic_write(self.run.root / "pace_s", str(seconds))

    def step(self) -> int:
        """The newest step in the metrics, 0 before the first."""
        return newest_step(self.run.root)

    def until(self, seen: Callable[[], object], what: str, wait_s: float = WAIT_S) -> None:
        """Wait for something to come true. A failure shows what the jobs printed."""
        if not wait_for(lambda: bool(seen()), wait_s, poll_s=0.05):
            queue = slurm(self.bed, "squeue", "--format=%i %T %r %N")
            raise AssertionError(
                f"not after {wait_s:.0f} s: {what}\n{self.attempts()}\n{queue}\n{output(self.run)}"
            )

    def until_step(self, step: int) -> None:
        """Wait until a step is in the metrics."""
        self.until(lambda: self.step() >= step, f"step {step}")

    def attempts(self) -> list[dict[str, Any]]:
        """attempt.json of every attempt that ranks took."""
        files = (
            self.run.attempt(n) / "attempt.json" for n in range(1, self.run.latest_attempt() + 1)
        )
        return [json.loads(path.read_text()) for path in files if path.exists()]

    def trains_again(self, attempts: int) -> bool:
        """Whether a step was logged by an attempt after the first `attempts`."""
        return any(row["kind"] == "step" for row in rows_since(self.run, attempts))

    def steps_lost(self, attempt: int) -> int:
        """How many steps had been logged already of those that an attempt trained (by its place
        among those that trained).
        """
        starts = [row["start_step"] for row in rows(self.run.root, "attempt")]
        logged = [row["step"] for row in rows_since(self.run, attempt - 2, attempt - 1)]
        return max(logged, default=starts[attempt - 1]) - int(starts[attempt - 1])

    def people(self, words: str) -> list[Inhabitant]:
        """Processes of jobs on the nodes: those of `RANK`, `TORCHRUN` or `HELPER`, by node."""
        everyone = self.bed.inhabitants()
        found = [who for who in everyone if "/python" in who.command.partition(" ")[0]]
        if words == RANK:
            found = [who for who in found if TORCHRUN not in who.command]
        mine = [w for w in found if words in w.command and str(self.run.root) in w.command]
        return sorted(mine, key=lambda who: who.host)

    def kill(self, words: str, which: int = 0) -> None:
        """kill -9 of one of them."""
        os.kill(self.people(words)[which].pid, signal.SIGKILL)

    def finish(self, *more: FaultRun) -> None:
        """Let this run, and more of its kind, go on at full speed to their end, with nothing left
        of them on the nodes.
        """
        for one in (self, *more):
            one.pace(0.0)
        for one in (self, *more):
            one.until(one.run.done.exists, "the run ends")
        self.until(lambda: not slurm(self.bed, "squeue", "--noheader"), "the queue is empty")
        self.until(lambda: not left_of_jobs(self.bed), "nobody is left on the nodes", 20.0)


def left_of_jobs(bed: Testbed) -> list[Inhabitant]:
    """Processes that jobs left on nodes, but for Slurm's own."""
    return [who for who in bed.inhabitants() if who.name != "slurmstepd"]


def rows_since(run: RunDir, attempts: int, until: int | None = None) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl that were written after the first `attempts` attempts, and by the first
    `until`.
    """
    count, out = 0, []
    for line in run.metrics.read_bytes().splitlines():
        if not line.endswith(b"}"):
            continue
        row = json.loads(line)
        count += row["kind"] == "attempt"
        if count > attempts and (until is None or count <= until):
            out.append(row)
    return out


def preempt(bed: Testbed, folder: Path) -> None:
    """Submit a job of high priority that takes every node for a second."""
    urgent = ["--partition=high", "--nodes=4", "--exclusive", "--output=/dev/null"]
    slurm(bed, "sbatch", *urgent, f"--chdir={folder}", "--wrap=sleep 1")


def bring_limit_near(bed: Testbed, job_id: str) -> None:
    """Lower a job's time limit so far that Slurm soon tells it to stop, but not so far that it is
    ended at once.

    Slurm looks every 30 s, counts in minutes, and gives the signal that is due 30 s before the
    limit 60 s before it.
    """
    age_s = time.time() - datetime.fromisoformat(job_field(bed, job_id, "StartTime")).timestamp()
    minutes = int((age_s + 35.0) // 60.0) + 1
    slurm(bed, "scontrol", "update", f"jobid={job_id}", f"TimeLimit={minutes}")


def loss_by_step(run: Path, steps: int = STEPS) -> list[float]:
    """The loss of every step of the final lineage, which has no gap."""
    found = {
        row["step"]: row["loss"]
        for row in read_metrics(run / "metrics.jsonl")
        if row["kind"] == "step"
    }
    assert sorted(found) == list(range(1, steps + 1))
    return [found[step] for step in sorted(found)]


def steps_lost(run: RunDir) -> int:
    """How many steps were trained more than once, by the run's own record."""
    trained = [row["step"] for row in rows(run.root, "step")]
    return len(trained) - len(set(trained))


def assert_as_undisturbed(run: RunDir, reference: Path, rtol: float = 0.0) -> None:
    """Losses are those of the reference, every exposure was consumed once, and W&B has one run
    without a gap.

    Args:
        rtol: relative tolerance, where the reference has another number of ranks; 0 = bit by bit.
    """
    losses = loss_by_step(run.root)
    np.testing.assert_allclose(losses, loss_by_step(reference), rtol=rtol, atol=0.0)
    audit = motet_audit(run)
    assert "missing 0, repeated 0, unplanned 0" in audit
    assert mirrored(run) == dict(enumerate(losses, start=1))


def motet_audit(run: RunDir) -> str:
    """What `motet experiments audit --replay` says; it must pass."""
    done = motet("experiments", "audit", str(run.root), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def mirrored(run: RunDir) -> dict[int, float]:
    """Loss by step over all offline files of W&B, which are of one run id and do not contradict
    each other.
    """
    files = sorted((run.root / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    found = [whole_records(path) for path in files]
    names = {one.run_id for file in found for one in of_type(file, "run")}
    assert names == {(run.root / "wandb_id").read_text().strip()}
    losses: dict[int, float] = {}
    for row in (row for file in found for row in history(file) if "train/loss" in row):
        assert losses.setdefault(row["step"], row["train/loss"]) == row["train/loss"]
    return dict(sorted(losses.items()))


def whole_records(path: Path) -> Sequence[Any]:
    """Records of a `.wandb` file up to the one that a kill left torn."""
    out: list[Any] = []
    with contextlib.suppress(AssertionError):  # the checksum of a torn record
        out.extend(records(path))  # keeps what came before it
    return out
