"""Real runs of the installed command, small enough for a test."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from motet.experiments.stream.ledger import read_records
from motet.launcher import cli

MOTET = [sys.executable, "-m", "motet.launcher.cli"]
TIMEOUT_S = 240

RUN_YAML = """
name: {name}
seed: 3
model: {{preset: 1m, d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, d_ffn: 64, head_dim: 16}}
data: {{sequence_length: 320, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 8}}
training:
  steps: 24
  precision: fp32
  schedule: {{warmup_steps: 4}}
checkpoint: {{every_steps: 6}}
layout: {{processes: 2, device: cpu, micro_sequences: 2}}
experiments:
  draws: 200
  list:
    - {{name: canaries, use: memorization, doses: [0, 2], generate: {{count: 12}}, options: {{n_references: 7}}}}
    - {{name: facts, use: knowledge, placebo: none, generate: {{count: 10}}, placement: anywhere, schedule: {{every: 2, start: 1}}}}
    - {{name: aa, use: placebo, generate: {{count: 10}}}}
    - {{name: strong, use: positive_control, doses: [0, 8], generate: {{count: 8}}}}
"""


def make_corpus(folder: Path) -> Path:
    """Prepare a corpus of the project's own documentation and code."""
    root = Path(__file__).parents[2]
    inputs = [str(root / "experiments"), str(root / "launcher")]
    done = motet("data", "prepare", *inputs, "--output", str(folder), "--vocabulary-size", "1024")
    assert done.returncode == 0, done.stderr
    return folder


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}


def motet(
    *arguments: str, cwd: Path | None = None, umask: int = -1
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, perhaps under another umask."""
    return subprocess.run(
        [*MOTET, *arguments],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        cwd=cwd,
        umask=umask,
        env=environment(),
    )


def motet_here(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """As `motet`, in this process, which has loaded torch already: for commands that start no
    other and refusals that come before they would. `test_readme.py` types each at a shell.
    """
    out, err = io.StringIO(), io.StringIO()
    umask = os.umask(0o022)
    try:
        with (
            contextlib.chdir(cwd or Path.cwd()),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
        ):
            code = cli.main(list(arguments))
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os.umask(umask)
    return subprocess.CompletedProcess(list(arguments), code, out.getvalue(), err.getvalue())


def replaced(text: str, edits: Sequence[tuple[str, str]]) -> str:
    """Return a text with the first of each old words replaced; all of them are there."""
    for old, new in edits:
        assert old in text
        text = text.replace(old, new, 1)
    return text


def newest_step(run: Path) -> int:
    """Return the newest step in a run's metrics, 0 before the first."""
    return max((row["step"] for row in rows(run, "step")), default=0)


def write_yaml(
    folder: Path, corpus: Path, name: str = "r", edit: Callable[[str], str] = str
) -> Path:
    """Write a run.yaml; its runs go to FOLDER/runs."""
    path = folder / f"{name}.yaml"
    path.write_text(edit(RUN_YAML.format(name=name, corpus=corpus)))
    return path


def train_until(yaml: Path, step: int, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """Start training and return once `step` is in the metrics; the caller ends it."""
    run = yaml.parent / "runs" / yaml.stem
    process = subprocess.Popen(
        [*MOTET, "train", str(yaml), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=yaml.parent,
        env=environment(),
    )
    wait_for_step(process, run, step)
    return process, run


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Return once `step` is in the metrics; the process must live until then."""
    deadline = time.monotonic() + TIMEOUT_S
    while newest_step(run) < step:
        assert process.poll() is None, process.stdout.read() if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_rank(run: Path, rank: int, number: signal.Signals) -> None:
    """Send a signal to one rank of the newest attempt."""
    attempt = max(int(path.name) for path in (run / "attempts").iterdir())
    os.kill(int((run / "attempts" / str(attempt) / f"pid-{rank}").read_text().split()[0]), number)


def who_trained(run: Path) -> dict[int, tuple[str | None, ...]]:
    """Return who trained on each slot, by the ledger; each slot once."""
    found: dict[int, tuple[str | None, ...]] = {}
    for path in run.glob("ledger/segment-*/rank-*.bin"):
        for record in read_records(path):
            for slot in range(record.first_slot, record.first_slot + record.count):
                assert slot not in found
                found[slot] = record.members_at(slot)
    return found


def rows(run: Path, kind: str) -> list[dict[str, Any]]:
    """Return the metrics rows of one kind as they stand, torn lines left out."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [row for row in found if row["kind"] == kind]


def losses(run: Path) -> dict[int, float]:
    """Return the loss of every step, the newest where a step ran twice."""
    return {row["step"]: row["loss"] for row in rows(run, "step")}
