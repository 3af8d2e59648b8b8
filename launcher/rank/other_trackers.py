"""Trackio and TensorBoard beside Weights & Biases, behind the same protocol
(`motet.launcher.runs.metrics.Tracker`).

Each works in one background thread, as the mirror to W&B does: the package is imported there, and
nothing that fails or waits there reaches training.
"""

from __future__ import annotations

import contextlib
import queue
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from motet.launcher.rank.mirrored_rows import history_of
from motet.launcher.rank.wandb_mirror import first_line, stored_run_id, without_secrets

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

QUEUE_ROWS = 10_000
FINISH_S = 30.0


class QueuedTracker(ABC):
    """A queue and a thread. No method raises or waits, but `close`.

    Args:
        rundir: of the run.
        config: its settings as plain data, without secrets.
        say: tells the user of a failure, once.
    """

    title = ""

    def __init__(
        self,
        rundir: RunDir,
        config: Mapping[str, Any],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.rundir, self.config = rundir, without_secrets(dict(config))
        self.failure: str | None = None
        self._say = say or (lambda message: print(message, file=sys.stderr))
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(QUEUE_ROWS)
        self._thread = threading.Thread(target=self._work, name=f"{self.title}", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Show the numbers of one row of `metrics.jsonl`."""
        kept = dict(row)
        self._put(lambda: self.numbers(history_of(kept), int(kept["step"])))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Show a table, such as the answers."""
        self._put(lambda: self.show_table(name, columns, rows, step))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Show values of the whole run."""
        kept = without_secrets(dict(values))
        self._put(lambda: self.show_summary(kept))

    def close(self, wait_s: float | None = None) -> None:
        """Send what is left, for at most `wait_s` (None: 30 s)."""
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(None)
        self._thread.join(FINISH_S if wait_s is None else wait_s)
        if self._thread.is_alive():
            self._fail("it did not finish in time")

    # --- in the thread; may raise

    @abstractmethod
    def open(self) -> None:
        """Import the package and begin."""

    @abstractmethod
    def numbers(self, values: Mapping[str, Any], step: int) -> None:
        """Show numbers by name."""

    @abstractmethod
    def show_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Show a table."""

    @abstractmethod
    def show_summary(self, values: Mapping[str, Any]) -> None:
        """Show values of the whole run."""

    @abstractmethod
    def finish(self) -> None:
        """Write what is left."""

    def _put(self, what: Callable[[], None]) -> None:
        if self.failure is None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(what)

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self._say(f"{self.title}: {reason}. Training goes on; metrics.jsonl holds every row.")

    def _work(self) -> None:
        try:
            self.open()
            while (what := self._queue.get()) is not None:
                what()
            self.finish()
        except BaseException as error:  # a thread that only shows must not end anything else
            self._fail(f"{type(error).__name__}: {first_line(error)}")


class TensorBoardTracker(QueuedTracker):
    """Event files in `RUN/tensorboard`; a table is text, summary values are numbers at the last
    step.
    """

    title = "TensorBoard"
    _step = 0

    def open(self) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.rundir.root / "tensorboard"))
        shown = "\n".join(f"    {line}" for line in str(self.config).splitlines())
        self._writer.add_text("config", shown, 0)

    def numbers(self, values: Mapping[str, Any], step: int) -> None:
        self._step = max(self._step, step)
        for name, value in values.items():
            if name not in ("step", "tokens"):
                self._writer.add_scalar(name, value, step)

    def show_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        self._step = max(self._step, step)
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [["" if x is None else str(x).replace("|", "\\|") for x in row] for row in lines]
        self._writer.add_text(name, "\n".join(f"| {' | '.join(row)} |" for row in cells), step)

    def show_summary(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, float(value), self._step)

    def finish(self) -> None:
        self._writer.close()


class TrackioTracker(QueuedTracker):
    """One Trackio run for all attempts: its name ends with the id that the run folder keeps."""

    title = "Trackio"

    def open(self) -> None:
        import trackio

        self._trackio, self._step = trackio, 0
        project = (self.config.get("tracking") or {}).get("project") or "motet"
        self._run = trackio.init(
            project=project,
            name=f"{self.rundir.name}-{stored_run_id(self.rundir)[:6]}",
            group=self.rundir.name,
            config=self.config,
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def numbers(self, values: Mapping[str, Any], step: int) -> None:
        self._step = max(step, self._step)
        # "step" is a name of Trackio's own, which it would rename with a warning at every row
        if kept := {name: value for name, value in values.items() if name != "step"}:
            self._run.log(kept, step=step)

    def show_table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        import pandas as pd

        frame = pd.DataFrame([list(row) for row in rows], columns=list(columns))
        self._step = max(step, self._step)
        self._run.log({name: self._trackio.Table(dataframe=frame)}, step=step)

    def show_summary(self, values: Mapping[str, Any]) -> None:
        numbers = {name: x for name, x in values.items() if isinstance(x, int | float)}
        if numbers:
            # without a step Trackio takes the next one, which no model was trained to
            self._run.log(numbers, step=self._step)

    def finish(self) -> None:
        self._run.finish()
