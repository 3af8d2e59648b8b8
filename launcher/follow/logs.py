"""What the ranks of a run printed: which files there are, and their lines as one stream.

torchrun keeps the output of a rank under `attempts/N/logs/ranks-F/ID/attempt_K/L/`: F is the first
rank of the node, L the rank on the node, K counts torchrun's restarts, each of which is an attempt
of the run of its own, N + K.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from motet.launcher.follow.tails import Tail
from motet.launcher.runs.rundir import RunDir

JOB = "slurm"
"""In place of a rank: the output of the job itself, by the name of the folder that holds it."""
EVERYTHING = 1 << 62
LOOK_EVERY_S = 1.0
"""How often new files are looked for: a run of 4,096 ranks has thousands of folders."""
_TEED = re.compile(r"\[[\w-]*?\d+\]:")
"""torchrun repeats what a rank prints with such a prefix."""


@dataclass(frozen=True)
class LogSource:
    """One file of an attempt, in the folder of the attempt that its `launch` began with. `attempt`
    and `launch` are 0 and `rank` is `JOB` for the output of a job.
    """

    attempt: int
    rank: int | str
    path: Path
    launch: int = 0

    @property
    def label(self) -> str:
        """The prefix of its lines."""
        return JOB if self.rank == JOB else f"{self.attempt}.{self.rank}"


@dataclass(frozen=True)
class LogLine:
    """One line, safe to show."""

    source: LogSource
    text: str


@dataclass(frozen=True)
class LogChoice:
    """Which lines are wanted.

    Attributes:
        rank: None for all.
        attempt: None for the newest that printed anything, and those that begin later.
        whole_launch: with the newest, those before it in the same launch: what was there before
            its ranks were started anew.
    """

    rank: int | str | None = None
    attempt: int | None = None
    whole_launch: bool = False

    def takes(self, source: LogSource, newest: int) -> bool:
        """Return whether a file is wanted, where `newest` is the newest attempt that had printed
        anything at first.
        """
        if self.rank is not None and source.rank != self.rank:
            return False
        if source.rank == JOB:
            return self.attempt is None or self.rank == JOB
        return source.attempt == self.attempt if self.attempt else source.attempt >= newest


def sources(run: RunDir) -> list[LogSource]:
    """Return every file that holds output of the run."""
    logs = [
        LogSource(0, JOB, path)
        for path in _listed(run.job_files)
        if path.name.startswith("output-")
    ]
    for folder in _listed(run.attempts):
        if not folder.name.isdecimal():
            continue
        number = int(folder.name)
        for entry in _listed(run.logs(number)):
            if entry == run.first_rank_log(number):
                logs.append(LogSource(number, 0, entry, number))
            elif entry.name.startswith("ranks-") and entry.name[6:].isdecimal():
                first = int(entry.name[6:])
                logs += [s for sub in _listed(entry) for s in _of_torchrun(sub, number, first)]
            else:
                logs += _of_torchrun(entry, number, 0)
    return logs


def _of_torchrun(folder: Path, number: int, first_rank: int) -> Iterator[LogSource]:
    """Yield the files of one torchrun on one node."""
    for restart in _listed(folder):
        count = restart.name.removeprefix("attempt_")
        for rank in _listed(restart) if count.isdecimal() else ():
            if rank.name.isdecimal():
                for name in ("stdout.log", "stderr.log"):
                    if (rank / name).exists():
                        yield LogSource(
                            number + int(count), first_rank + int(rank.name), rank / name, number
                        )


def _holds_text(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except OSError:
        return False


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


class Merged:
    """The lines of a run's chosen files in the order in which they arrive.

    Lines carry no time: what was there before the first poll comes file by file, the file that was
    written last at the end.

    Args:
        run: the run.
        choice: which files.
        lines: how many of the last lines of each file the first poll gives.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        run: RunDir,
        choice: LogChoice,
        lines: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.choice, self.lines = run, choice, lines
        self._clock = clock
        self._tails: dict[Path, tuple[LogSource, Tail]] = {}
        self._first = True
        self._newest = 0
        self._looked_s = 0.0

    def poll(self, flush: bool = False) -> list[LogLine]:
        """Return the lines that are new; `flush` ends with lines that have no end yet."""
        if self._first or flush or self._clock() - self._looked_s >= LOOK_EVERY_S:
            self._open_new()
        ranks = any(source.rank != JOB for source, _ in self._tails.values())
        pieces = []
        for source, tail in self._tails.values():
            texts = tail.read(flush)
            if source.rank == JOB and self.choice.rank is None and ranks:
                texts = [text for text in texts if not _TEED.match(text)]
            if texts:
                pieces.append((tail.written_ns, [LogLine(source, text) for text in texts]))
        pieces.sort(key=lambda piece: piece[0])
        return [line for _, lines in pieces for line in lines]

    def _open_new(self) -> None:
        for source in self._chosen():
            if source.path not in self._tails:
                lines = self.lines if self._first else EVERYTHING
                self._tails[source.path] = (source, Tail(source.path, lines))
        self._first, self._looked_s = False, self._clock()

    def _chosen(self) -> list[LogSource]:
        every = sources(self.run)
        if self._first:
            printed = [s for s in every if _holds_text(s.path)]
            newest = max(printed, key=lambda s: s.attempt, default=LogSource(0, JOB, self.run.root))
            self._newest = newest.launch if self.choice.whole_launch else newest.attempt
            every = _newest_job(every) if self.choice.attempt is None else every
        return [source for source in every if self.choice.takes(source, self._newest)]


def _newest_job(every: Iterable[LogSource]) -> list[LogSource]:
    """Leave out the output of all jobs but the newest."""
    found = list(every)
    jobs = [source for source in found if source.rank == JOB]
    newest = max(jobs, key=lambda source: source.path.stat().st_mtime, default=None)
    return [source for source in found if source.rank != JOB or source is newest]
