"""What was found damaged in a run folder, and what several of its parts are compared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from motet.core.errors import DamagedFile, UserError
from motet.core.files import FROM_A_COPY
from motet.launcher.runs import seals
from motet.launcher.runs.ancestors import segments_used
from motet.launcher.runs.rundir import RunDir

BROKEN = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError, OverflowError)
"""What reading a file that holds something else can raise; `UserError` is a `ValueError`."""
UNKNOWN = "made before hashes were kept"
GIVEN_UP = "segments given up"
"""Segments of the ledger that nothing grew from."""
TOLD_ONLY = ("metrics.jsonl", "attempts", GIVEN_UP, "eval")
"""Parts of which a report shows curves, times and benchmarks, and no answer is made."""


@dataclass(frozen=True)
class Damage:
    """One damaged thing: the file, what is wrong with it, and what would work."""

    path: str
    what: str
    remedy: str = FROM_A_COPY
    part: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.path} {self.what}; {self.remedy}"


@dataclass
class Findings:
    """What was found in one run folder.

    Attributes:
        full: hash corpora again even where content, size and time are known.
        step: the checkpoint whose weights are looked at; None: all of them.
        damage: every damaged thing.
        unknown: what no hash vouches for.
        looked: which parts were looked at.
    """

    run: RunDir
    full: bool = False
    step: int | None = None
    damage: list[Damage] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)
    looked: list[str] = field(default_factory=list)

    def look(self, part: str, at: Callable[[Findings], None]) -> None:
        """Look at one part: what it cannot read hides nothing of the others."""
        self.looked.append(part)
        try:
            at(self)
        except DamagedFile as error:
            self.add(error.path, error.what, error.remedy)
        except BROKEN as error:
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            self.add(self.run.root / part, f"cannot be understood: {kind}{error}")
        self.damage = list(dict.fromkeys(self.damage))

    def add(self, path: Path, what: str, remedy: str = FROM_A_COPY) -> None:
        """Note one damaged thing."""
        inside = path.relative_to(self.run.root) if path.is_relative_to(self.run.root) else path
        self.damage.append(Damage(str(inside), what, remedy, self.looked[-1]))

    def reading(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """Return what `read` returns; note what it finds damaged, and return None."""
        try:
            return read(*arguments)
        except DamagedFile as error:
            self.add(error.path, error.what, error.remedy)
            return None

    @property
    def spoils(self) -> list[str]:
        """Damage on which no verdict can rest, in words."""
        return [str(one) for one in self.damage if one.part not in TOLD_ONLY]

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """`manifest.json`, {} when it cannot be read."""
        return self.reading(seals.read_manifest, self.run) or {}

    @cached_property
    def segments_used(self) -> set[int]:
        """Segments of the ledger that a checkpoint or a measurement grew from."""
        return segments_used(self.run, self.checkpoints)

    @cached_property
    def checkpoints(self) -> dict[int, dict[str, Any]]:
        """Manifests of the checkpoints that can be read, by step."""
        found = {}
        wanted = None if self.step is None or self.step < 0 else self.step
        for step in self.run.checkpoint_steps():
            if wanted not in (None, step):
                continue
            if one := self.reading(seals.read_checkpoint, self.run, step):
                found[step] = one
        return found
