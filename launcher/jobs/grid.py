"""Runs that differ in some settings: every combination of the values of `--grid`. Pure.

Each combination is a run and a job of its own, no task of a job array: a task shares the script of
its array, and a setting may change nodes, time limit or layout.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from motet.core.errors import UserError

MOST_RUNS = 256
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z0-9_]+)*")
_OWN = {"name": "each run gets a name of its own", "runs": "all runs lie in one folder"}
_BRACKETS = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class GridPoint:
    """One combination.

    Attributes:
        suffix: of the run's name, such as `lr1e-3-steps200`.
        words: settings as a command line has them.
    """

    suffix: str
    words: tuple[str, ...]


def points(grids: Sequence[str], given: Sequence[str] = ()) -> list[GridPoint]:
    """Return all combinations; the last axis changes fastest.

    Args:
        grids: each SETTING=VALUE,VALUE,...
        given: other settings of the command line.

    Raises:
        UserError: an axis is no setting with values, a setting or a value comes twice, or there are
            too many combinations.
    """
    axes: dict[str, list[str]] = {}
    fixed = {word.partition("=")[0] for word in given}
    for text in grids:
        setting, equals, values = text.partition("=")
        if not equals or not _SETTING.fullmatch(setting):
            raise UserError(
                f"--grid {text}: is no setting with values, such as training.optimizer.lr=1e-3,3e-3"
            )
        if setting in _OWN:
            raise UserError(f"--grid {text}: {_OWN[setting]}; give {setting}=... without --grid")
        if setting in axes:
            raise UserError(f"--grid {text}: {setting} has values already; give all in one --grid")
        if setting in fixed:
            raise UserError(f"--grid {text}: {setting} is given beside the grid, too; keep one")
        axes[setting] = _values(text, values)
    number = math.prod(len(values) for values in axes.values())
    if number > MOST_RUNS:
        sizes = " x ".join(str(len(values)) for values in axes.values())
        raise UserError(f"--grid: {sizes} = {number:,} runs; at most {MOST_RUNS} at once")
    return _named(axes, _labels(axes))


def _named(axes: Mapping[str, Sequence[str]], labels: Mapping[str, str]) -> list[GridPoint]:
    chosen = [dict(zip(axes, one, strict=True)) for one in itertools.product(*axes.values())]
    names = ["-".join(labels[k] + _in_name(v) for k, v in one.items()) for one in chosen]
    if len(set(names)) < len(names):  # values that differ only in what no name can have
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    words = [tuple(f"{k}={v}" for k, v in one.items()) for one in chosen]
    return [GridPoint(name, word) for name, word in zip(names, words, strict=True)]


def _values(text: str, values: str) -> list[str]:
    """The values between commas that are in no bracket and no quotes."""
    found, waiting, quote = [""], list[str](), ""
    for char in values:
        if char == "," and not waiting and not quote:
            found.append("")
            continue
        found[-1] += char
        if quote:
            quote = "" if char == quote else quote
        elif char in "\"'":
            quote = char
        elif char in _BRACKETS:
            waiting.append(_BRACKETS[char])
        elif waiting and char == waiting[-1]:
            waiting.pop()
    found = [value.strip() for value in found]
    if waiting or quote:
        raise UserError(f"--grid {text}: {(waiting or [quote])[-1]} is missing")
    if "" in found:
        raise UserError(f"--grid {text}: a value is empty; write null or '' for none")
    if twice := [value for value in found if found.count(value) > 1]:
        raise UserError(f"--grid {text}: {twice[0]} comes twice, and its runs would be equal")
    return found


def _labels(axes: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The shortest end of each setting's path that no other axis has."""
    found = {}
    for name in axes:
        parts = name.split(".")
        for count in range(1, len(parts) + 1):
            label = ".".join(parts[-count:])
            if sum(f".{other}".endswith(f".{label}") for other in axes) == 1:
                break
        found[name] = label
    return found


def _in_name(value: str) -> str:
    """A value in characters that a run's name may have."""
    return re.sub(r"[^A-Za-z0-9.-]+", "_", value.replace("+", "")).strip("_") or "_"
