"""Errors that a user's setting or file can cause, told as one message.

They live in the lowest room so that every other room can raise them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple


class UserError(ValueError):
    """A mistake of the user's: the command line prints it, without a traceback, and exits 2.

    The root of every room's own error of this kind, so that one `except` catches them all.

    Attributes:
        problems: what it lists, each apart; empty for one that is a message only.
    """

    problems: tuple[Problem, ...] = ()


class DamagedFile(UserError):
    """A file that was written before is missing, cut short, altered, or another one.

    Attributes:
        path: the file.
        what: what is wrong with it.
        remedy: what would work.
    """

    def __init__(self, path: Path, what: str, remedy: str) -> None:
        super().__init__(f"{path} {what}; {remedy}")
        self.path, self.what, self.remedy = path, what, remedy


class Problem(NamedTuple):
    """One thing that is wrong: `setting` names it, `message` says its value, why not and what would
    work.
    """

    setting: str
    message: str

    def __str__(self) -> str:
        return f"{self.setting}: {self.message}"


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise one `UserError` that lists every problem; do nothing when there is none."""
    if not problems:
        return
    told = str(problems[0])
    if len(problems) > 1:
        lines = "\n".join(f"  - {problem}" for problem in problems)
        told = f"{len(problems)} problems:\n{lines}"
    error = UserError(told)
    error.problems = tuple(problems)
    raise error


def problems_in(error: UserError, setting: str) -> list[Problem]:
    """Return what an error lists; all of its message under `setting` where it lists nothing."""
    return list(error.problems) or [Problem(setting, str(error))]


def suggest(word: str, options: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the nearest option, or `""` when none is near."""
    import difflib  # not needed before something is wrong

    near = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f" (did you mean {near[0]!r}?)" if near else ""
