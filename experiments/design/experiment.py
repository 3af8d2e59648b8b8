"""The class that every experiment extends: where its units come from, what is probed, and what its
outcomes are.

Shapes: U units, I probe items (in the order of units, then of each unit's items), S probe steps.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np

from motet.core.errors import Problem, raise_problems
from motet.core.plugins import PluginError, mistakes_of
from motet.experiments.design.spec import ExperimentSpec, as_step
from motet.experiments.design.units import read_units
from motet.experiments.stream.random import U64
from motet.experiments.types import F64, I64, ItemScores, OutcomeSpec, Unit


@dataclass(frozen=True)
class NoOptions:
    """For a class without options."""


class Experiment(ABC):
    """One question: where its units come from, what is probed, and what the outcomes are.

    A subclass sets the class variables, turns one row of items into a `Unit` (`unit_of`), invents
    rows (`generate_rows`), and turns item scores into outcomes (`measure`). Rows of a user's JSONL
    and invented rows have the same fields and pass the same checks.

    Attributes:
        description: one line, for lists.
        protocol: one sentence for the report: what was shown, what is compared.
        defaults: the faithful settings, as in YAML.
        Options: a frozen dataclass of the experiment's own options, each with a default.
        role: "question", "placebo" or "positive_control"; of a global treatment "whole_run".
        treatment: "local", units in the stream; "semi-global", format or loss of many documents,
            randomized per document; "global", a property of the whole run, with one arm.
        inserts_units: False = exposures of every arm carry i.i.d. base text, never a unit's text
            (A/A).
        follows_exposure: True = the report shows the effect against steps since exposure.
        fields: required fields of a row, beside `id`, and their types.
        optional_fields: those that a row may have.
        removes: True = a unit's text is in the corpora, and an exposure of it is base text that
            takes its place.
        needs_items: True = it invents no units.
        membership: outcomes by which shown units are told from held-out ones; the report gives AUC
            and true-positive rates of each, by arm.
        membership_by: the attribute within whose values alone units are told apart; "" none.
        order: the outcome whose rank correlation with the step of exposure is told; "" none.
    """

    description: ClassVar[str]
    protocol: ClassVar[str]
    defaults: ClassVar[dict[str, Any]]
    Options: ClassVar[type[Any]] = NoOptions
    role: ClassVar[str] = "question"
    treatment: ClassVar[str] = "local"
    inserts_units: ClassVar[bool] = True
    follows_exposure: ClassVar[bool] = False
    fields: ClassVar[dict[str, tuple[type, ...]]] = {}
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {}
    removes: ClassVar[bool] = False
    needs_items: ClassVar[bool] = False
    membership: ClassVar[tuple[str, ...]] = ()
    membership_by: ClassVar[str] = ""
    order: ClassVar[str] = ""

    def __init_subclass__(cls, **keywords: Any) -> None:
        """A global treatment is no question that its run can answer, whatever its class says."""
        super().__init_subclass__(**keywords)
        if cls.treatment == "global":
            cls.role, cls.inserts_units = "whole_run", False

    def __init__(self, spec: ExperimentSpec) -> None:
        self.spec = spec
        self.options: Any = self.Options(**spec.options)
        self._units: list[Unit] | None = None

    @property
    def noise_deviation(self) -> float:
        """Standard deviation of the noise that its units' texts carry on their input embeddings; 0
        for none. Prompt and target of every item of such a class are, together, its unit's text.
        """
        return 0.0

    def text_numbers(self, arms: I64, unit_keys: U64, repetition: I64, seed: int) -> I64 | None:
        """Which of its unit's texts each exposure shows, int64 [rows]; None: as `variants` of the
        arms say. A pure function of its arguments.

        Args:
            arms: int64 [rows], number of the unit's arm.
            unit_keys: uint64 [rows].
            repetition: int64 [rows], 0 for a unit's first exposure.
            seed: of the plan.
        """
        return None

    def masked_characters(self, unit: Unit, number: int) -> int:
        """How many characters at the beginning of a unit's text `number` carry no loss."""
        return 0

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
        _, more = read_units(self)
        return found + more

    def units(self) -> list[Unit]:
        """The units, with their blocks and clusters. UserError lists every bad row as file:line."""
        if self._units is None:
            units, problems = read_units(self)
            raise_problems(problems)
            self._units = units
        return self._units

    def probe_steps(self, steps_total: int) -> set[int]:
        """Steps to probe at: 0, the last one before any exposure, the asked ones, and the end."""
        first = min(self.spec.schedule.first_step(steps_total), steps_total)
        asked = resolve_probes(self.spec.probe_at, first, steps_total)
        return {0, first, steps_total} | asked


class Kinds(Protocol):
    """Where the classes that `use:` names are found; `library.kinds.Library` is one."""

    def kind(self, use: str, setting: str, sha256: str | None = None) -> type[Experiment]:
        """Return the class; PluginError when there is none, or its source is not `sha256`."""
        ...

    def source_sha256(self, use: str, setting: str) -> str | None:
        """Return the SHA-256 of a user's own source, None for a built-in class."""
        ...


def make(spec: ExperimentSpec, kinds: Kinds) -> Experiment:
    """Return the experiment of a spec.

    Raises:
        UserError: its class is missing or is not the one that the spec was made with.
    """
    where = f"experiments.{spec.name}.use"
    kind = kinds.kind(spec.use, where, spec.use_sha256)
    with mistakes_of(kind, where):
        return kind(spec)


def item_problems(spec: ExperimentSpec, kinds: Kinds) -> list[Problem]:
    """Return every problem of an experiment's settings and items; mistakes in a user's class are
    among them.
    """
    try:
        experiment = make(spec, kinds)
        with mistakes_of(type(experiment), f"experiments.{spec.name}.use"):
            return experiment.problems()
    except PluginError as error:
        return [error.problem]


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
