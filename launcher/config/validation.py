"""The section `validation` of a run.yaml: the loss on text that is not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.core.errors import Problem
from motet.launcher.config.field import setting


@dataclass(frozen=True)
class ValidationCorpusSettings:
    """A corpus of its own, which is never trained on."""

    path: str = setting("", "folder that `motet data prepare` or `index` made", kind="path")
    name: str | None = setting(None, "what its loss is called; null = the folder's name")


@dataclass(frozen=True)
class ValidationSettings:
    """Loss on held-out documents or on corpora of their own. Off unless one of them is given."""

    documents: int = setting(
        0,
        "documents of each training corpus, drawn at random, that training leaves out and that are "
        "validated on; 0 = none",
        unit="documents",
        least=0,
    )
    corpora: tuple[ValidationCorpusSettings, ...] = setting(
        (), "corpora of their own to validate on"
    )
    every: float = setting(
        0.05,
        "time between validations; the last step is validated in any case",
        unit="fraction of the run",
        above=0,
        most=1,
    )
    sequences: int = setting(
        64, "most sequences of each corpus in one validation", unit="sequences", least=1
    )

    @property
    def used(self) -> bool:
        """Whether anything is validated."""
        return bool(self.documents or self.corpora)


def names_of(validation: ValidationSettings, trained: Sequence[str]) -> list[str]:
    """Return what each loss is called: held-out documents by their corpus, in the order of
    the corpora that are `trained` on (their paths), then the corpora of their own.
    """
    held = [Path(path).name for path in trained] if validation.documents else []
    held = [
        name if held.count(name) == 1 else f"{name}-{number}" for number, name in enumerate(held)
    ]
    return held + [entry.name or Path(entry.path).name for entry in validation.corpora]


def validation_problems(validation: ValidationSettings, trained: Sequence[str]) -> list[Problem]:
    """Return corpora without a path, those that are trained on too, and names that stand twice."""
    names = names_of(validation, trained)
    first, out = len(names) - len(validation.corpora), []
    for number, entry in enumerate(validation.corpora):
        where, name = f"validation.corpora.{number}", names[first + number]
        if not entry.path:
            out.append(Problem(f"{where}.path", "is missing; give the folder of a corpus"))
        elif entry.path in trained:
            why = f"{entry.path} is trained on too; validation.documents holds some of it out"
            out.append(Problem(f"{where}.path", why))
        elif name in names[: first + number]:
            why = f"{name!r} is what another validation loss is called; choose another"
            out.append(Problem(f"{where}.name", why))
    return out
