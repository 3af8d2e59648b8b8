"""What every experiment is made of: units, probe items, outcomes, and the class that ties them.

Shapes: U units, I probe items (in the order of units, then of each unit's items), S probe steps.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from motet.core.errors import Problem, UserError, raise_problems, suggest
from motet.experiments.design.spec import ExperimentSpec, as_step

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ProbeItem:
    """One measurement: how likely is `target` right after `prompt`. `id` is unique in its unit."""

    id: str
    kind: str
    prompt: str
    target: str


@dataclass(frozen=True)
class Unit:
    """The smallest thing that is randomized.

    `texts` are what exposures show (the first one is the original, the others are its variants);
    `items` are what probes measure. Units with one `cluster` move together; units are randomized
    within their `block`.
    """

    id: str
    texts: tuple[str, ...]
    items: tuple[ProbeItem, ...]
    attributes: dict[str, str | int | float] = field(default_factory=dict)
    cluster: str = ""
    block: str = ""


@dataclass(frozen=True)
class OutcomeSpec:
    """One number per unit, what it is called and how it is judged.

    `chance` is the value of a guess (binary outcomes). `contrast` names the (treated, control) arms
    that are compared; None compares every arm with a dose to every arm without. `baseline` names
    the series whose value before any exposure is adjusted for; None means the outcome's own series,
    "" none. `null_sd` is the standard deviation between units when there is no effect, if it is
    known.
    """

    name: str
    label: str
    unit: str
    higher_is: str
    binary: bool = False
    chance: float | None = None
    primary: bool = False
    secondary: bool = True
    contrast: tuple[tuple[str, ...], tuple[str, ...]] | None = None
    baseline: str | None = None
    null_sd: float | None = None


@dataclass(frozen=True)
class ItemScores:
    """What the model said about every item at one probe step.

    logprob: float64 [I], sum over the target's tokens, nats. n_tokens, n_bytes: int64 [I], length
    of the target. greedy: bool [I], whether greedy decoding from the prompt reproduces the target.
    """

    logprob: F64
    n_tokens: I64
    n_bytes: I64
    greedy: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class NoOptions:
    """For a class without options."""


class ItemTable:
    """The items of a list of units as columns, to aggregate scores per unit."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self.n_units = len(units)
        self.unit_I = np.repeat(np.arange(len(units)), [len(unit.items) for unit in units])
        self.kind_I = np.array([item.kind for unit in units for item in unit.items], dtype=object)

    def of_kind(self, kind: str) -> npt.NDArray[np.bool_]:
        """Which items are of this kind, bool [I]."""
        return np.asarray(self.kind_I == kind, dtype=bool)

    def mean(self, values_I: npt.NDArray[Any], kind: str) -> F64:
        """Mean over each unit's items of one kind, float64 [U]; NaN for a unit without any."""
        chosen = self.of_kind(kind)
        units = self.unit_I[chosen]
        count = np.bincount(units, minlength=self.n_units)
        total = np.bincount(
            units, weights=np.asarray(values_I, np.float64)[chosen], minlength=self.n_units
        )
        return np.where(count > 0, total / np.maximum(count, 1), np.nan)

    def only(self, values_I: npt.NDArray[Any], kind: str) -> list[F64]:
        """The values of one kind, one array per unit."""
        chosen = self.of_kind(kind)
        counts = np.bincount(self.unit_I[chosen], minlength=self.n_units)
        return np.split(np.asarray(values_I, np.float64)[chosen], np.cumsum(counts)[:-1])


def per_token(scores: ItemScores) -> F64:
    """Log-probability per target token, nats, float64 [I]; NaN for an empty target."""
    return np.where(scores.n_tokens > 0, scores.logprob / np.maximum(scores.n_tokens, 1), np.nan)


class Experiment(ABC):
    """One question: where its units come from, what is probed, and what the outcomes are.

    A subclass sets the class variables, turns one row of items into a `Unit` (`unit_of`), invents
    rows (`generate_rows`), and turns item scores into outcomes (`measure`). Rows of a user's JSONL
    and invented rows have the same fields and pass the same checks.
    """

    description: ClassVar[str]
    protocol: ClassVar[str]
    """One sentence for the report: what was shown, what is compared."""
    defaults: ClassVar[dict[str, Any]]
    """The faithful settings, as in YAML."""
    Options: ClassVar[type[Any]] = NoOptions
    role: ClassVar[str] = "question"
    inserts_units: ClassVar[bool] = True
    """False: exposures of every arm carry i.i.d. base text, never a unit's text (A/A)."""
    follows_exposure: ClassVar[bool] = False
    """True: the report shows the effect against steps since exposure."""
    fields: ClassVar[dict[str, tuple[type, ...]]] = {}
    """Required fields of a row, beside `id`, and their types."""
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {}

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.options: Any = self.Options(**spec.options)
        self._units: list[Unit] | None = None

    @property
    @abstractmethod
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        """All outcomes; exactly one is primary."""

    @abstractmethod
    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        """One checked row -> unit. ValueError says what is wrong with the row."""

    @abstractmethod
    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        """Invent `count` rows; row i depends on the seed and i, not on `count`."""

    @abstractmethod
    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        """Values per unit at one probe step: {series name: float64 [U]}."""

    def summarize(
        self,
        units: Sequence[Unit],
        arms: I64,
        steps: I64,
        series: Mapping[str, F64],
        exposure_steps: Sequence[I64],
    ) -> dict[str, F64]:
        """Final outcomes, {outcome name: float64 [U]}, from series float64 [S, U].

        The default is the value at the last probe. What a unit's outcome is must not be defined
        through its own arm, or the comparison with dose 0 is no longer a randomization test.
        """
        return {name: values[-1] for name, values in series.items()}

    def definition_problems(self) -> list[Problem]:
        """Problems of the settings alone; reads no file."""
        return []

    def problems(self) -> list[Problem]:
        """Every problem of the settings and of the items."""
        found = self.definition_problems()
        _, more = self._read_units()
        return found + more

    def units(self) -> list[Unit]:
        """The units, with their blocks and clusters. UserError lists every bad row as file:line."""
        if self._units is None:
            units, problems = self._read_units()
            raise_problems(problems)
            self._units = units
        return self._units

    def probe_steps(self, steps_total: int) -> set[int]:
        """Steps to probe at: 0, the last one before any exposure, the asked ones, and the end."""
        first = min(self.spec.schedule.first_step(steps_total), steps_total)
        asked = resolve_probes(self.spec.probe_at, first, steps_total)
        return {0, first, steps_total} | asked

    def _read_units(self) -> tuple[list[Unit], list[Problem]]:
        from motet.experiments.design.clusters import with_groups

        where = f"experiments.{self.spec.name}.items"
        if self.spec.items is None:
            asked = self.spec.generate
            rows: Iterable[tuple[str, Any]] = (
                (f"{where}[{number}]", row)
                for number, row in enumerate(self.generate_rows(asked["count"], asked["seed"]))
            )
        else:
            rows = jsonl_rows(self.spec.items)
        units: list[Unit] = []
        problems: list[Problem] = []
        seen: dict[str, str] = {}
        for place, row in rows:
            try:
                unit = self._checked_unit(row)
                if unit.id in seen:
                    raise ValueError(f"repeats the id {unit.id!r} of {seen[unit.id]}")
            except ValueError as error:
                problems.append(Problem(place, str(error)))
                continue
            seen[unit.id] = place
            units.append(unit)
        if len(units) < 2 and not problems:
            problems.append(Problem(where, f"has {len(units)} units; at least 2 are needed"))
        if problems:
            return units, problems
        grouped, more = with_groups(units, self.spec)
        return grouped, more

    def _checked_unit(self, row: Any) -> Unit:
        if isinstance(row, json.JSONDecodeError):
            raise ValueError(f"is not JSON: {row}")
        if not isinstance(row, Mapping):
            raise ValueError(f"is {type(row).__name__}; each line must be an object with an id")
        wanted = {"id": (str, int), **self.fields}
        for name, types in wanted.items():
            if name not in row:
                near = suggest(name, [str(key) for key in row])
                needed = ", ".join(wanted)
                raise ValueError(f"has no field {name!r}{near}; a row needs {needed}")
            check_field(name, row[name], types)
        for name, types in self.optional_fields.items():
            if row.get(name) not in (None, "", []):
                check_field(name, row[name], types)
        known = {*wanted, *self.optional_fields}
        extra = {
            str(key): value
            for key, value in row.items()
            if key not in known and isinstance(value, (str, int, float))
        }
        unit = self.unit_of({**row, "id": str(row["id"])})
        if not unit.texts or not all(text.strip() for text in unit.texts):
            raise ValueError("has an empty text")
        if any(not item.prompt or not item.target for item in unit.items):
            raise ValueError("has a probe with an empty prompt or target")
        return replace(unit, attributes={**extra, **unit.attributes})


def check_field(name: str, value: Any, types: tuple[type, ...]) -> None:
    """ValueError when a field has another type or is an empty text or list."""
    good = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
    if not good:
        names = " or ".join("text" if t is str else t.__name__ for t in types)
        raise ValueError(f"has {name}={value!r:.80}; it must be {names}")
    if isinstance(value, (str, list)) and len(value) == 0:
        raise ValueError(f"has an empty {name}")


def texts_of(row: Mapping[str, Any], name: str) -> list[str]:
    """A list field whose members must all be text. ValueError otherwise."""
    values = row.get(name) or []
    if not all(isinstance(value, str) and value.strip() for value in values):
        raise ValueError(f"has {name}={values!r:.80}; it must be a list of texts")
    return [str(value) for value in values]


def jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield ("file:line", row) per non-empty line; a line that is not JSON yields the error.

    Raises UserError when the file cannot be read as UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", error


def resolve_probes(probe_at: Mapping[str, Any], first: int, steps_total: int) -> set[int]:
    """The `probe_at` setting as steps in [0, steps_total].

    `log_grid: n` is n points at log-spaced distances from `first`, the last step before any
    exposure.
    """
    steps: set[int] = set()
    for kind, value in probe_at.items():
        if kind == "every":
            stride = max(1, as_step(value, steps_total))
            steps |= set(range(0, steps_total + 1, stride))
        elif kind == "log_grid":
            steps |= log_grid(first, steps_total, int(value))
        else:
            steps |= {as_step(step, steps_total) for step in value}
    return {step for step in steps if 0 <= step <= steps_total}


def log_grid(first: int, last: int, points: int) -> set[int]:
    """Up to `points` steps after `first`, at distances 1 ... last - first, evenly spaced in log."""
    if last <= first:
        return set()
    return {first + round(d) for d in np.geomspace(1, last - first, max(points, 2)).tolist()}
