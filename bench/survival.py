"""Signals and kills against real runs: `python bench/survival.py [--json] [--trials 20] [--ranks 2
4] [--kills 3]`.

One run per number of ranks is stopped and resumed `--trials` times. Each trial sends SIGTERM to one
rank, drawn at random: at a moment drawn uniformly from the run's life (its start included), inside
a probe, or while a checkpoint is being written. A trial passes when `motet` exits with 0, every
rank stopped at one step, that step was saved once (never, when no step had run), no process is
left, and the exit took at most a step + a save + 2 s. Then kill -9 of a rank, `--kills` times: the
time until torchrun has started the ranks anew, and until the first new step. At the end `motet
experiments audit` judges the whole run.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from motet.core.processes import catches, children, command_line
from motet.experiments.stream.ledger import read_records, readable_segments, segment_folder
from motet.launcher.runs.ranks import ranks_of

MOTET = [sys.executable, "-m", "motet.launcher.cli"]
WAIT_S = 120.0
SLACK_S = 2.0
RUN_YAML = """
name: run
seed: 3
model: {{preset: 1m, d_model: 64, n_layers: 2, n_heads: 4, n_kv_heads: 2, d_ffn: 128, head_dim: 16}}
data: {{sequence_length: 384, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 16}}
training: {{steps: 4000, precision: fp32, schedule: {{warmup_steps: 4}}, max_restarts: 100}}
checkpoint: {{every_steps: 25, keep: 2}}
probes: {{every: 0.01, batch_tokens: 512}}
layout: {{device: cpu, micro_sequences: 4}}
experiments:
  list:
    - {{name: canaries, use: memorization, doses: [0, 2], generate: {{count: 160}}, options: {{n_references: 7}}}}
    - {{name: aa, use: placebo, generate: {{count: 10}}}}
"""


@dataclass(frozen=True)
class Trial:
    """One SIGTERM.

    Attributes:
        kind: "any" moment, "probe" or "save"; rank: which was told; after_s: moment, from the start
            of `motet`.
        step: where all ranks stopped; saves: checkpoints written of it; code: of `motet`.
        exit_s: from the signal to the end of `motet`; bound_s: a step + a save + 2 s, as measured
            in this trial.
        problem: what failed, "" when nothing did.
    """

    kind: str
    rank: int
    after_s: float
    step: int
    saves: int
    code: int
    exit_s: float
    bound_s: float
    problem: str


class Run:
    """A run folder and the `motet` that trains it."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self.folder, self.ranks, self.root = folder, ranks, folder / "runs" / "run"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin, or go on."""
        resume = [*MOTET, "resume", str(self.root)]
        train = [*MOTET, "train", str(self.folder / "run.yaml"), f"layout.processes={self.ranks}"]
        with open(self.folder / "output.txt", "ab") as output:
            self.process = subprocess.Popen(
                resume if (self.root / "resolved.yaml").exists() else train,
                stdout=output,
                stderr=output,
                cwd=self.folder,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )
        self.began, self.first_row = time.monotonic(), len(self.rows())

    def agent(self) -> int | None:
        """The process id of torchrun."""
        assert self.process is not None
        return next(iter(children(self.process.pid)), None)

    def rows(self, kind: str = "") -> list[dict[str, Any]]:
        """Rows of metrics.jsonl as they stand."""
        path = self.root / "metrics.jsonl"
        lines = path.read_bytes().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith(b"}")]
        return [row for row in found if not kind or row["kind"] == kind]

    def fresh(self, kind: str) -> list[dict[str, Any]]:
        """Rows that came since `start`."""
        return [row for row in self.rows()[self.first_row :] if row["kind"] == kind]

    def published(self) -> int:
        """The step of the newest checkpoint; -1 without one."""
        found = (self.root / "checkpoints").glob("step-*/manifest.json")
        return max((int(path.parent.name.removeprefix("step-")) for path in found), default=-1)

    def wait(self, ready: Callable[[], Any]) -> Any:
        """Wait for something; what it is."""
        assert self.process is not None
        deadline = time.monotonic() + WAIT_S
        while not (found := ready()):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{ready}: {(self.folder / 'output.txt').read_text()[-3000:]}")
            time.sleep(0.002)
        return found

    def ranks_ready(self) -> list[int]:
        """Process ids by rank, once all can hear a signal; else []."""
        agent = self.agent()
        found = ranks_of(agent) if agent else []
        ready = len(found) == self.ranks and all(catches(pid, signal.SIGTERM) for pid in found)
        return found if ready else []

    def leftovers(self) -> list[int]:
        """Processes of this run that live."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in pids if str(self.root) in command_line(pid)]


def moment(run: Run, kind: str, rng: random.Random, life_s: float) -> None:
    """Wait for the moment of a trial."""
    run.wait(run.ranks_ready)
    if kind == "any":
        time.sleep(rng.uniform(0.0, life_s))
    elif kind == "probe":
        run.wait(lambda: any(row["step"] % 40 == 0 for row in run.fresh("step")))
        time.sleep(rng.uniform(0.0, 0.05))
    else:
        run.wait(lambda: run.fresh("step") and list((run.root / "checkpoints").glob(".*.part")))


def last_steps(run: Run) -> set[int]:
    """The step after the last record of each rank's ledger in the newest segment."""
    ledger = run.root / "ledger"
    newest = readable_segments(ledger)[-1]
    files = segment_folder(ledger, newest.segment).glob("rank-*.bin")
    ends = [[record.step + 1 for record in read_records(path)] for path in files]
    return {steps[-1] if steps else newest.start_step for steps in ends}


def trial(run: Run, kind: str, rng: random.Random, life_s: float) -> Trial:
    """Start, send SIGTERM to one rank, judge."""
    run.start()
    moment(run, kind, rng, life_s)
    rank = rng.randrange(run.ranks)
    pids = run.wait(run.ranks_ready)
    after_s, sent = time.monotonic() - run.began, time.monotonic()
    os.kill(pids[rank], signal.SIGTERM)
    assert run.process is not None
    code = run.process.wait(WAIT_S)
    exit_s, left = time.monotonic() - sent, run.leftovers()
    steps, saved = run.fresh("step"), run.fresh("checkpoint")
    if not steps:
        problem = _problem(code, left, exit_s, SLACK_S, [])
        return Trial(kind, rank, after_s, -1, 0, code, exit_s, SLACK_S, problem)
    step, ends = steps[-1]["step"], last_steps(run)
    saves = sum(row["step"] == step for row in saved)
    folder = run.root / "checkpoints" / f"step-{step:08d}" / "manifest.json"
    wrong = [] if ends == {step} else [f"ranks stopped at {sorted(ends)}, metrics at {step}"]
    wrong += [] if folder.exists() and saves == 1 else [f"{saves} saves of step {step}"]
    save_s = max(0.0, folder.stat().st_mtime - steps[-1]["time"]) if folder.exists() else 0.0
    step_s = max(sum(row["seconds"].values()) for row in steps[-20:])
    bound_s = step_s + save_s + SLACK_S
    problem = _problem(code, left, exit_s, bound_s, wrong)
    return Trial(kind, rank, after_s, step, saves, code, exit_s, bound_s, problem)


def _problem(code: int, left: list[int], exit_s: float, bound_s: float, wrong: list[str]) -> str:
    found = list(wrong)
    found += [f"exit code {code}"] if code else []
    found += [f"processes left: {left}"] if left else []
    found += [f"exit took {exit_s:.1f} s, not {bound_s:.1f} s"] if exit_s > bound_s else []
    return "; ".join(found)


def kill(run: Run, rng: random.Random) -> dict[str, float]:
    """kill -9 of one rank; seconds from the kill until torchrun started the ranks anew, and from
    there to the first new step.

    After a checkpoint of the attempt is published: several deaths without one between them are a
    crash loop, which ends a run.
    """
    saved = run.published()
    run.wait(lambda: run.published() > saved)
    before = run.wait(run.ranks_ready)
    attempts = len(run.fresh("attempt"))
    os.kill(before[rng.randrange(run.ranks)], signal.SIGKILL)
    killed = time.monotonic()

    def anew() -> bool:
        agent = run.agent()
        found = ranks_of(agent) if agent else []
        return len(found) == run.ranks and not set(found) & set(before)

    run.wait(anew)
    restarted = time.monotonic()
    run.wait(lambda: len(run.fresh("attempt")) > attempts)
    known = len(run.fresh("step"))
    run.wait(lambda: len(run.fresh("step")) > known)
    now = time.monotonic()
    return {"restart_s": restarted - killed, "first_step_s": now - restarted}


def kinds(trials: int) -> Iterator[str]:
    """At least a fifth in a probe and a fifth in a save, the rest at any moment."""
    aimed = -(-trials // 5)
    yield from ["probe"] * aimed + ["save"] * aimed + ["any"] * (trials - 2 * aimed)


def life(run: Run) -> float:
    """Seconds from when ranks can hear a signal until step 60: the moments that are drawn from."""
    run.start()
    run.wait(run.ranks_ready)
    heard = time.monotonic()
    run.wait(lambda: len(run.fresh("step")) >= 60)
    lived_s = time.monotonic() - heard
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    run.process.wait(WAIT_S)
    return lived_s


def measure(folder: Path, corpus: Path, ranks: int, trials: int, kills: int) -> dict[str, Any]:
    """All trials on one number of ranks."""
    folder.mkdir()
    (folder / "run.yaml").write_text(RUN_YAML.format(corpus=corpus))
    run, rng = Run(folder, ranks), random.Random(ranks)
    order = list(kinds(trials))
    rng.shuffle(order)
    life_s, done = life(run), []
    for kind in order:
        done.append(trial(run, kind, rng, life_s))
        print(f"# {ranks} ranks: {done[-1]}", file=sys.stderr)
    run.start()
    killed = [kill(run, rng) for _ in range(kills)]
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    code = run.process.wait(WAIT_S)
    audit = subprocess.run(
        [*MOTET, "experiments", "audit", str(run.root)], capture_output=True, text=True
    )
    return {
        "ranks": ranks,
        "trials": [asdict(found) for found in done],
        "passed": sum(not found.problem for found in done),
        "exit_s": summary([found.exit_s for found in done]),
        "kills": killed,
        "restart_s": summary([found["restart_s"] for found in killed]),
        "first_step_s": summary([found["first_step_s"] for found in killed]),
        "last_exit_code": code,
        "audit": audit.returncode,
    }


def summary(values: list[float]) -> dict[str, float]:
    """Median and largest."""
    return {"median": statistics.median(values), "most": max(values)} if values else {}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="motet-survival-") as name:
        corpus = Path(name) / "corpus"
        text = Path(sysconfig.get_paths()["stdlib"]) / "json"
        prepare = ["data", "prepare", str(text), "--output", str(corpus)]
        command = [*MOTET, *prepare, "--vocabulary-size", "512", "--quiet"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        results = [
            measure(Path(name) / f"ranks-{n}", corpus, n, arguments.trials, arguments.kills)
            for n in arguments.ranks
        ]
    if arguments.json:
        print(json.dumps(results, indent=1))
    for found in [] if arguments.json else results:
        print(
            f"{found['ranks']} ranks: {found['passed']} of {len(found['trials'])} stops as "
            "promised, exit after "
            f"{found['exit_s']['median']:.1f} s (at most {found['exit_s']['most']:.1f} s); kill "
            "-9: ranks anew after "
            f"{found['restart_s'].get('median', 0):.1f} s, first new step "
            f"{found['first_step_s'].get('median', 0):.1f} s later; "
            f"audit {'passed' if found['audit'] == 0 else 'FAILED'}"
        )
    good = all(found["passed"] == len(found["trials"]) and found["audit"] == 0 for found in results)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
