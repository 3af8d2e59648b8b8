"""What a person sees while a run trains: a bar on a terminal, one line per interval anywhere else
and in a file.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from motet.core import format
from motet.core.marks import rich_console

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_INTERVAL_S = 10.0
PACE_STEPS = 1000
"""Time left is by the wall clock of so many steps, so that probes and checkpoints count."""
SURE_AFTER = 3
"""No time is shown before this step of an attempt: the first one compiles and warms up."""


class TrainingProgress:
    """Shows step, loss, tokens/s and time left; use as a context manager.

    Rank 0 speaks, others are silent.

    `steps` is where the run ends, `start_step` where this attempt begins. `log` gets the plain
    lines that a terminal does not show (elsewhere standard output is kept as it is, and this file
    is not made). `clock` and `console` are given by tests.
    """

    def __init__(
        self,
        steps: int,
        start_step: int = 0,
        rank: int = 0,
        console: Console | None = None,
        interval_s: float = PLAIN_INTERVAL_S,
        clock: Callable[[], float] = time.monotonic,
        log: Path | None = None,
    ) -> None:
        self.steps = steps
        self._step = start_step
        self._interval_s = interval_s
        self._clock = clock
        self._printed_s: float | None = None
        self._began_at = start_step
        self._done: deque[tuple[int, float]] = deque(maxlen=PACE_STEPS + 1)
        """(step, when it was done), without the first of this attempt."""
        self._console: Console | None = None
        self._bar: RichProgress | None = None
        self._task: TaskID | None = None
        self._text = ""
        self._log: TextIO | None = None
        if rank == 0:
            self._open(console, log)

    def _open(self, console: Console | None, log: Path | None) -> None:
        self._console = console or rich_console(highlight=False)
        if self._console.is_terminal:
            self._bar = _bar(self._console)
            self._task = self._bar.add_task(
                "training", total=self.steps, completed=self._step, text="", left=""
            )
            if log is not None:
                log.parent.mkdir(parents=True, exist_ok=True)
                self._log = log.open("a", encoding="utf-8", buffering=1)

    def __enter__(self) -> TrainingProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        if self._log is not None:
            self._log.close()
            self._log = None

    def update(self, step: int, loss: float | None, tokens_per_s: float, note: str = "") -> None:
        """Tell that `step` updates are done.

        A step back (rollback) restarts the estimate of time left.
        """
        if self._console is None:
            return
        now = self._clock()
        self._estimate(step, now)
        self._text = f"loss {format.loss(loss)}  {format.short(tokens_per_s)} tokens/s" + (
            note and f"  {note}"
        )
        seconds = self.seconds_left()
        left = "" if seconds is None else f"{format.clock(seconds)} left"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, text=self._text, left=left)
        due = self._printed_s is None or now - self._printed_s >= self._interval_s
        if step >= self.steps or due:
            self._printed_s = now
            line = f"step {step:,}/{self.steps:,}  {self._text}  {left}".rstrip()
            if self._bar is None:
                self.print(line)
            else:
                self._keep(line)

    def seconds_left(self) -> float | None:
        """Estimate from the steps done since the first of this attempt, which takes longer than
        others; None before `SURE_AFTER` of them, unless nothing is left.
        """
        if self._step >= self.steps:
            return 0.0
        if len(self._done) < 2 or self._done[-1][0] < self._began_at + SURE_AFTER:
            return None
        (first, began), (last, now) = self._done[0], self._done[-1]
        return (now - began) / (last - first) * (self.steps - last)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show what happens instead of training, such as "probing" or "saving"."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, description=name)
        try:
            yield
        finally:
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, description="training")

    def print(self, message: str) -> None:
        """Print a line above the bar."""
        if self._console is not None:
            self._console.print(message, markup=False, highlight=False, soft_wrap=True)
            self._keep(message)

    def _keep(self, message: str) -> None:
        """Write a line to the file; a full disk there does not end training."""
        if self._log is not None:
            with contextlib.suppress(OSError):
                self._log.write(f"{message}\n")

    def _estimate(self, step: int, now: float) -> None:
        if step < self._step:
            self._done.clear()
            self._began_at = step
        elif step > self._step:
            self._done.append((step, now))
        self._step = step


def _bar(console: Console) -> RichProgress:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as RichBar

    return RichBar(
        TextColumn("{task.description:<8}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TextColumn("{task.fields[left]}", style="dim", markup=False),
        console=console,
        refresh_per_second=4,
        transient=False,
    )
