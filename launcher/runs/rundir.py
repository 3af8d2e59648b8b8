"""The folder of one run: every path in it.

Nothing else spells a path inside a run folder.
"""

from __future__ import annotations

import re
from pathlib import Path

from motet.core.access import UMASK, follow, make_shared
from motet.core.errors import DamagedFile, UserError
from motet.core.files import read_text

_CHECKPOINT = re.compile(r"step-(\d{8,})")
_GROWN = re.compile(r"step-(\d{8,})\.grown")


class RunDir:
    """Paths of one run. Making the object touches no disk."""

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"RunDir({str(self.root)!r})"

    def __fspath__(self) -> str:
        return str(self.root)

    @classmethod
    def open(cls, root: Path | str) -> RunDir:
        """The run folder at `root`; `UserError` when it is none."""
        run = cls(root)
        if not run.root.is_dir():
            raise UserError(f"{root} does not exist; give the folder of a run, such as runs/NAME")
        if not run.resolved_yaml.exists():
            raise UserError(f"{root} is not the folder of a run: it has no resolved.yaml")
        return run

    @property
    def name(self) -> str:
        """Name of the folder."""
        return self.root.name

    @property
    def run_yaml(self) -> Path:
        """The run.yaml as the user wrote it, followed by the command line settings as comments."""
        return self.root / "run.yaml"

    @property
    def resolved_yaml(self) -> Path:
        """Every setting with its value; `${oc.env:...}` stays as written."""
        return self.root / "resolved.yaml"

    @property
    def manifest(self) -> Path:
        """The frozen facts of the run as JSON: sizes, hashes, corpora."""
        return self.root / "manifest.json"

    @property
    def frozen_json(self) -> Path:
        """Hash of every file of plan and code, as they were frozen."""
        return self.root / "frozen.json"

    @property
    def plan(self) -> Path:
        """Folder of the frozen study: definition, units, exposure plan, lock."""
        return self.root / "plan"

    @property
    def code(self) -> Path:
        """Folder that holds the snapshot of the package; jobs run with it in PYTHONPATH."""
        return self.root / "code"

    @property
    def plugins(self) -> Path:
        """Folder of the user's own classes that the run was frozen with."""
        return self.code / "plugins"

    @property
    def attempts(self) -> Path:
        """Folder of every start of the run."""
        return self.root / "attempts"

    @property
    def metrics(self) -> Path:
        """The run's own record, one JSON line per event."""
        return self.root / "metrics.jsonl"

    @property
    def ledger(self) -> Path:
        """Folder of what the model really consumed, by segment."""
        return self.root / "ledger"

    @property
    def probes(self) -> Path:
        """Folder of the scores of units, one file per probed step."""
        return self.root / "probes"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.root / "checkpoints"

    @property
    def members(self) -> Path:
        """Folder of models that were exported."""
        return self.root / "members"

    @property
    def evaluations(self) -> Path:
        """Folder of the results of benchmarks, by model."""
        return self.root / "eval"

    @property
    def divergence(self) -> Path:
        """How far neighbouring members lie apart, where that was measured."""
        return self.root / "divergence.json"

    @property
    def report_html(self) -> Path:
        """The report as a page."""
        return self.root / "report.html"

    @property
    def report_json(self) -> Path:
        """The report as data."""
        return self.root / "report.json"

    @property
    def judgement(self) -> Path:
        """The verdicts as they were given first, at the frozen steps; never overwritten."""
        return self.root / "judgement.json"

    @property
    def done(self) -> Path:
        """Marker of a finished run: the step that it reached."""
        return self.root / "DONE"

    def finished(self, steps: int) -> bool:
        """Return whether the run has reached its last step, `steps`.

        Raises:
            DamagedFile: its DONE marker names no step.
        """
        return self.done.exists() and self.done_step() >= steps

    def done_step(self) -> int:
        """Return the step that the DONE marker names."""
        text = read_text(self.done).strip()
        if text and not text.isdecimal():
            raise DamagedFile(self.done, f"names no step: {text[:20]!r}", "delete it, and resume")
        return int(text or 0)

    @property
    def lock(self) -> Path:
        """Held while the run is trained; who holds it, not that it exists, says so."""
        return self.root / ".lock"

    @property
    def presence(self) -> Path:
        """Held by every rank that is at work, so that the run counts as trained even when nothing
        watches its ranks.
        """
        return self.root / ".ranks"

    @property
    def joining(self) -> Path:
        """Folder where several machines meet that train the run by hand."""
        return self.root / "joining"

    @property
    def job_files(self) -> Path:
        """Folder of what was submitted, to any scheduler: script, commands, output of the jobs."""
        return self.root / "slurm"

    @property
    def jobs_json(self) -> Path:
        """The submitted jobs as JSON, newest last (`job_files.py`)."""
        return self.job_files / "jobs.json"

    @property
    def job_script(self) -> Path:
        """The batch script that was submitted last."""
        return self.job_files / "job.sbatch"

    @property
    def job_command(self) -> Path:
        """What the nodes of a job must know: groups of nodes, port, files of secrets. No secret."""
        return self.job_files / "command.json"

    @property
    def job_begun(self) -> Path:
        """Where the run stood when its newest job began."""
        return self.job_files / "begun.json"

    @property
    def cancelled(self) -> Path:
        """Marker of a run that was cancelled: its jobs do not requeue themselves."""
        return self.job_files / "cancelled"

    def meeting(self, number: int) -> Path:
        """Private folder where the machines of one launch find each other, by its first attempt."""
        return self.attempt(number) / "meeting"

    def logs(self, number: int) -> Path:
        """Folder of what the ranks of one attempt printed."""
        return self.attempt(number) / "logs"

    def first_rank_log(self, number: int) -> Path:
        """The progress of an attempt whose first rank speaks to a terminal, in plain lines."""
        return self.logs(number) / "rank-0.log"

    def attempt(self, number: int) -> Path:
        """Folder of one attempt (logs, environment). The first attempt is number 1."""
        return self.attempts / str(number)

    def skipped(self, number: int) -> Path:
        """Why the newest checkpoint of an attempt was skipped; there until one is saved again."""
        return self.attempt(number) / "skipped.txt"

    def launch_settings(self, number: int) -> Path:
        """Settings that a launch begins with; they become the run's `resolved_yaml` once its ranks
        train.
        """
        return self.attempt(number) / "resolved.yaml"

    def checkpoint(self, step: int, grown: bool = False) -> Path:
        """Folder of the checkpoint after `step` updates; `grown`: of the model that was made of
        that one, before it trained.
        """
        return self.checkpoints / f"step-{step:08d}{'.grown' if grown else ''}"

    def grown_steps(self) -> list[int]:
        """Steps after which a model grew and the new one was saved, ascending."""
        found = (_GROWN.fullmatch(path.name) for path in self.checkpoints.glob("step-*.grown"))
        return sorted(int(match[1]) for match in found if match)

    def checkpoint_steps(self) -> list[int]:
        """Steps of the published checkpoints, ascending."""
        if not self.checkpoints.is_dir():
            return []
        found = (_CHECKPOINT.fullmatch(entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def latest_attempt(self) -> int:
        """Number of the newest attempt, 0 before the first."""
        if not self.attempts.is_dir():
            return 0
        return max((int(p.name) for p in self.attempts.iterdir() if p.name.isdecimal()), default=0)

    def next_attempt(self) -> int:
        """Claim the next attempt: its folder is made here, so that no two starts share one."""
        number = self.latest_attempt() + 1
        while True:
            try:
                self.attempt(number).mkdir(parents=True)
                return number
            except FileExistsError:
                number += 1

    def create(self, access: str = UMASK) -> None:
        """Make the folders; from now on what this process makes is as open as the run is (see
        `make_shared` and `follow`).
        """
        make_shared(self.root, access)
        follow(self.root)
        for folder in (self.attempts, self.ledger, self.probes, self.checkpoints):
            folder.mkdir(exist_ok=True)
