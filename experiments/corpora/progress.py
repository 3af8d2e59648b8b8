"""How far a preparation or a search is, and the bar that shows it (rich is imported when it is
drawn).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

from motet.core.marks import rich_console

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class Progress(NamedTuple):
    """How far a preparation is."""

    stage: str  # "train tokenizer" or "encode"
    input_bytes: int
    input_bytes_total: int | None  # None when it cannot be known before reading
    text_bytes: int  # UTF-8, encoded in this run
    n_documents: int
    n_tokens: int


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Draw a bar on standard error; yields what to call with each `Progress`."""
    started_s: dict[str, float] = {}
    with _bar() as bar:
        task = bar.add_task("read", total=None, facts="")

        def show(progress: Progress) -> None:
            elapsed_s = time.monotonic() - started_s.setdefault(progress.stage, time.monotonic())
            bar.update(
                task,
                description=progress.stage,
                completed=progress.input_bytes,
                total=progress.input_bytes_total,
                facts=facts(progress, elapsed_s),
            )

        yield show


@contextmanager
def search_bar(n_tokens: int) -> Iterator[Callable[[int], None]]:
    """Draw a bar of a search through corpora on standard error; yields what to call with the number
    of tokens that were searched since the last call.
    """
    started_s, done = time.monotonic(), 0
    with _bar() as bar:
        task = bar.add_task("search corpora", total=n_tokens, facts="")

        def advance(tokens: int) -> None:
            nonlocal done
            done += tokens
            speed = done / 1e6 / max(time.monotonic() - started_s, 1e-3)
            shown = f"{done:,} tokens  {speed:.1f} million/s"
            bar.update(task, completed=done, facts=shown)

        yield advance


def _bar() -> Bar:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description:<15}"),
        BarColumn(),
        TextColumn("{task.fields[facts]}"),
        TimeRemainingColumn(),
        console=rich_console(stderr=True),
    )


def facts(progress: Progress, elapsed_s: float) -> str:
    """Return documents, tokens and speed as text; no speed before there is time to measure it."""
    text = f"{progress.n_documents:,} documents"
    if progress.n_tokens:
        text += f"  {progress.n_tokens:,} tokens"
    if elapsed_s > 0:
        text += f"  {progress.text_bytes / 1e6 / elapsed_s:.1f} MB/s"
    return text
