"""Settings: sequences that a run reads again and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from motet.core.errors import Problem
from motet.launcher.config.field import setting


@dataclass(frozen=True)
class RepeatSettings:
    """A small random set of sequences that is mixed into the fresh ones; a global treatment."""

    share: float = setting(
        0.0, "of the sequences of the run, that are of the set; 0 = no set", least=0, below=1
    )
    sequences: int = setting(
        0, "in the set; each is read share x run / sequences times", unit="sequences", least=0
    )
    mixed: str = setting(
        "block",
        "block: an exact share of every 10,000 sequences; batch: of every step",
        choices=("block", "batch"),
    )
    drawn: str = setting(
        "passes",
        "passes: the whole set, in a new order each time; replacement: each draw by itself",
        choices=("passes", "replacement"),
    )


def repeat_problems(repeat: RepeatSettings, slots: int, batches: Sequence[int]) -> list[Problem]:
    """What is wrong with a set in a run of so many sequences and batches of these sizes."""
    if not repeat.share:
        if repeat == RepeatSettings():
            return []
        message = "is 0, so nothing is repeated; give a share, or leave out data.repeat"
        return [Problem("data.repeat.share", message)]
    shown = repeat.share * slots
    if not 1 <= repeat.sequences <= shown:
        message = (
            f"is {repeat.sequences:,}, but {repeat.share:g} of the run's {slots:,} sequences is "
            f"{shown:,.0f}: a set has at least 1 sequence and is read once at least; "
            f"{max(1, round(shown / 100)):,} would be read 100 times"
        )
        return [Problem("data.repeat.sequences", message)]
    if repeat.mixed == "block":
        return []
    none = [size for size in batches if not 1 <= int(repeat.share * size + 0.5) < size]
    message = (
        f"is {repeat.share:g}, no whole row of a batch of {min(none, default=0)} sequences, or all "
        "of them; use another share, a larger batch, or data.repeat.mixed=block"
    )
    return [Problem("data.repeat.share", message)] if none else []
