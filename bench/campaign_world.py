"""Runs that a campaign lets things go wrong with, and what "as its undisturbed twin" means.

Used by `bench/campaign.py`. Every run here is that of `tests/slurm/fault_runs.py`: 60 steps, two
ranks, a checkpoint every 10 steps, so that runs here and on the testbed have one twin.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests of the same faults have the tools

from motet.core.files import atomic_write, read_json
from motet.core.processes import children, command_line
from motet.launcher.rank.safe_reader import SafeReader
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.runs.ranks import ranks_of
from motet.launcher.runs.rundir import RunDir
from tests.slurm.fault_runs import INTERVAL, write_run
from tests.system.runs import MOTET, environment, make_corpus, motet_here, rows

WAIT_S = 300.0
PACE_S = 0.15
QUIET = "metrics.wandb=off"
ENGINES = {"native": (), "deepspeed": ("layout.engine=deepspeed",), "accelerate": ("layout.engine=accelerate",)}  # fmt: skip


class Wrong(AssertionError):
    """What a case did is not what it should have done."""


def must(holds: object, told: str) -> None:
    """Fail a case unless something holds."""
    if not holds:
        raise Wrong(told)


@dataclass(frozen=True)
class Case:
    """One fault.

    Attributes:
        perfect: what should happen.
        act: lets it happen; returns what did, raises `Wrong` where that is not what should.
    """

    name: str
    group: str
    perfect: str
    act: Callable[[World], str]


class World:
    """A folder with a corpus, and the undisturbed twins that were needed so far."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng, self.count = folder, random.Random(seed), 0
        self.corpus = folder / "corpus"
        if not (self.corpus / "corpus.json").exists() and not any(folder.glob("corpus/*")):
            make_corpus(self.corpus)

    def seeded(self, seed: int) -> World:
        """Let the next case draw from its own seed."""
        self.rng = random.Random(seed)
        return self

    def new(self, *settings: str, where: Path | None = None) -> Trained:
        """A run of its own, not yet begun."""
        self.count += 1
        folder = where or self.folder / f"case-{self.count}"
        folder.mkdir(parents=True, exist_ok=True)
        return Trained(write_run(folder, self.corpus, "r", processes=2), (QUIET, *settings))

    def twin(self, *settings: str, key: str = "native", wait_s: float = WAIT_S) -> RunDir:
        """The run of these settings that nothing happens to, trained once."""
        folder = self.folder / f"twin-{key}"
        one = Trained(folder / "r.yaml", (QUIET, *settings))
        if not one.run.done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            one = self.new(*settings, where=folder)
            one.start(pace_s=0.0)
            one.ends(0, wait_s=wait_s)
        return one.run

    def copy(self, of: RunDir) -> RunDir:
        """A copy of a finished run, to be damaged."""
        self.count += 1
        root = self.folder / f"case-{self.count}" / "runs" / "r"
        shutil.copytree(of.root, root)
        return RunDir(root)


class Trained:
    """A run and the launch that trains it."""

    def __init__(
        self, yaml: Path, settings: Sequence[str] = (), more: dict[str, str] | None = None
    ):
        self.yaml, self.settings, self.more = yaml, settings, more or {}
        self.run = RunDir(yaml.parent / "runs" / "r")
        self.output = yaml.parent / "output.txt"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, pace_s: float = PACE_S, *words: str) -> Trained:
        """Begin it, or go on with it."""
        again = self.run.resolved_yaml.exists()
        command = (
            ["resume", str(self.run.root)] if again else ["train", str(self.yaml), *self.settings]
        )
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [*MOTET, *command, *words],
                stdout=output,
                stderr=output,
                cwd=self.yaml.parent,
                env=environment() | self.more,
                start_new_session=True,
            )
        self.known = len(rows(self.run.root, "step"))
        if not again:
            self.until(self.run.manifest.exists, "the run is frozen")
        self.pace(pace_s)
        return self

    def pace(self, seconds: float) -> None:
        """Let every step from now on wait so long before it begins."""
        atomic_write(self.run.root / "pace_s", str(seconds))

    @property
    def pid(self) -> int:
        """The launcher's."""
        assert self.process is not None
        return self.process.pid

    def torchrun(self) -> int:
        """Process id of torchrun; 0 without one."""
        return next(iter(children(self.pid)), 0)

    def ranks(self) -> list[int]:
        """Process ids of the ranks, by number."""
        agent = self.torchrun()
        return ranks_of(agent) if agent else []

    def step(self) -> int:
        """The newest step that this launch has logged, 0 before the first."""
        return max((row["step"] for row in rows(self.run.root, "step")[self.known :]), default=0)

    def until(
        self, seen: Callable[[], Any], what: str, wait_s: float = WAIT_S, poll_s: float = 0.02
    ) -> Any:
        """Wait for something to come true while the launch lives."""
        assert self.process is not None
        deadline = time.monotonic() + wait_s
        while not (found := seen()):
            must(self.process.poll() is None, f"it ended before {what}: {self.said()[-1500:]}")
            must(
                time.monotonic() < deadline,
                f"not after {wait_s:.0f} s: {what}: {self.said()[-1500:]}",
            )
            time.sleep(poll_s)
        return found

    def until_step(self, step: int) -> Trained:
        """Wait until a step is logged."""
        self.until(lambda: self.step() >= step, f"step {step}")
        return self

    def in_a_save(self) -> None:
        """Wait until a checkpoint is being written."""
        self.until(lambda: list(self.run.checkpoints.glob(".*.part")), "a save", poll_s=0.001)

    def ends(self, *codes: int, wait_s: float = WAIT_S) -> int:
        """Wait for the end of the launch, which must have one of these codes; nobody is left."""
        assert self.process is not None
        try:
            code = self.process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self.kill_all()
            raise Wrong(f"it did not end within {wait_s:.0f} s") from None
        must(code in codes, f"exit code {code}: {self.said()[-1500:]}")
        deadline = time.monotonic() + 60.0
        while left := self.people():
            must(time.monotonic() < deadline, f"processes left: {left}")
            time.sleep(0.1)
        return code

    def people(self) -> list[int]:
        """Processes that have to do with the run."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdecimal()]
        return [pid for pid in pids if str(self.run.root) in command_line(pid)]

    def said(self) -> str:
        """All that launches of it printed."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def resume(self, *words: str) -> Trained:
        """Go on, at full speed, to the end."""
        self.start(0.0, *words)
        self.ends(0)
        return self

    def attempts(self) -> list[dict[str, Any]]:
        """attempt.json of every attempt."""
        numbers = range(1, self.run.latest_attempt() + 1)
        paths = [self.run.attempt(number) / "attempt.json" for number in numbers]
        return [read_json(path) for path in paths if path.exists()]

    def reasons(self) -> list[str]:
        """How its attempts ended."""
        return [str(facts["reason"]) for facts in self.attempts()]

    def kill_all(self) -> None:
        """kill -9 of everything that trains the run; torchrun has a session of its own."""
        for pid in (self.pid, *self.people()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End what is left of a case that failed."""
        if self.process is not None and self.process.poll() is None:
            self.kill_all()
            self.process.wait()


def numbers_of(run: RunDir) -> dict[int, tuple[float, float]]:
    """(loss, gradient norm) of every step of the final lineage."""
    found = rows_of(read_metrics(run.metrics), "step")
    return {row["step"]: (row["loss"], row["grad_norm"]) for row in found}


def probes_of(run: RunDir) -> dict[str, dict[str, bytes]]:
    """Bytes of every probe array, by file; the facts name the segment, which a restart changes."""
    out = {}
    for path in sorted(run.probes.glob("step-*.npz")):
        with np.load(path, allow_pickle=False) as arrays:
            out[path.name] = {n: arrays[n].tobytes() for n in arrays.files if n != "facts"}
    return out


def weights_of(run: RunDir) -> dict[str, torch.Tensor]:
    """Every tensor of the last checkpoint: weights and the optimizer's."""
    folder = run.checkpoint(run.checkpoint_steps()[-1])
    entries: dict[str, Any] = SafeReader(folder).read_metadata().state_dict_metadata
    found = {n: torch.empty(tuple(e.size), dtype=e.properties.dtype) for n, e in entries.items()}
    dcp.load(dict(found), storage_reader=SafeReader(folder), no_dist=True)
    return found


def unlike(run: RunDir, twin: RunDir) -> list[str]:
    """In what a finished run differs from its undisturbed twin, bit for bit; [] = in nothing."""
    out = [] if numbers_of(run) == numbers_of(twin) else ["losses or gradient norms"]
    out += [] if probes_of(run) == probes_of(twin) else ["probe arrays"]
    mine, theirs = weights_of(run), weights_of(twin)
    same = mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)
    out += [] if same else ["weights"]
    audit = motet_here("experiments", "audit", str(run.root), "--replay")
    proved = audit.returncode == 0 and "missing 0, repeated 0, unplanned 0" in audit.stdout
    out += [] if proved else [f"audit --replay: {audit.stdout[-300:]}{audit.stderr[-300:]}"]
    whole = motet_here("verify", str(run.root))
    out += [] if whole.returncode == 0 else [f"verify: {whole.stdout[-300:]}{whole.stderr[-300:]}"]
    return out


def as_twin(one: Trained, twin: RunDir) -> str:
    """Judge a run that has ended; what it did, in words."""
    different = unlike(one.run, twin)
    must(not different, f"differs from its twin in {'; '.join(different)}")
    logged = [row["step"] for row in rows(one.run.root, "step")]
    again = len(logged) - len(set(logged))
    attempts = len(one.attempts())
    return f"equal; {again} steps again, {attempts} attempt{'s' if attempts > 1 else ''}"


__all__ = ["ENGINES", "INTERVAL", "Case", "Trained", "World", "Wrong", "as_twin", "must", "unlike"]
