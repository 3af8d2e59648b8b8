"""The typed definition of an experiment: what YAML says, checked once, frozen as canonical JSON.

Conventions of time that every room shares: *step* k names the model after k optimizer updates, and
an exposure "at step e" sits in the batch that makes update e + 1. A probe at step e is therefore
the last one before that exposure and a probe at step e + 1 the first one after it (lag 1).

No torch, no scipy, no numpy: the front door reads definitions before anything heavy is imported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from motet.core.hashing import canonical_json, sha256_hex

ALPHA = 0.05
DOSE_UNITS = ("exposures", "documents", "tokens", "share")
SCHEDULE_KINDS = ("uniform", "steps", "every", "early", "late", "early_late", "tokens")
PLACEMENTS = ("anywhere", "start", "boundary")
PLACEBOS = ("matched", "none")
VARIANTS = ("same", "cycle")
TESTS = ("contrast", "trend", "omnibus")
PROBE_KINDS = ("every", "steps", "fractions", "log_grid")


@dataclass(frozen=True)
class Arm:
    """One group that units are randomized to.

    `dose` counts exposures per unit, or is the arm's total in the spec's `dose_in`. `variants` says
    which of a unit's texts repetition r shows: "same" always the first, "cycle" text r mod n.
    `weight` is how many units the arm gets relative to the other arms. `window` is the part of the
    schedule's window in which its exposures lie, two shares of it; None, and left out of the
    definition, is all of it.
    """

    name: str
    dose: float
    variants: str = "same"
    weight: int = 1
    window: tuple[float, float] | None = None

    @property
    def is_control(self) -> bool:
        """Dose 0: the unit's own text is never shown."""
        return self.dose == 0


@dataclass(frozen=True)
class Schedule:
    """When exposures happen. Floats are fractions of the run, ints are steps (see `resolve`).

    uniform: anywhere in `window` · steps: at the steps `at` · every: `start`, `start + every`, ...
    · early / late: first / last quarter of the window · early_late: each unit randomized between
    the two · tokens: uniform over `token_range` (tokens consumed before, half open).
    """

    kind: str = "uniform"
    window: tuple[float, float] = (0.0, 0.9)
    at: tuple[float, ...] = ()
    every: float = 100
    start: float = 100
    token_range: tuple[int, int] | None = None

    def resolve(self, steps_total: int) -> Schedule:
        """The same schedule with `window`, `at`, `every` and `start` as whole steps of this run."""
        low, high = (as_step(edge, steps_total) for edge in self.window)
        return replace(
            self,
            window=(low, max(low, high)),
            at=tuple(as_step(step, steps_total) for step in self.at),
            every=max(1, as_step(self.every, steps_total)),
            start=as_step(self.start, steps_total),
        )

    def first_step(self, steps_total: int) -> int:
        """The earliest step at which any exposure can happen; 0 for a range of tokens."""
        steps = self.resolve(steps_total)
        low, high = int(steps.window[0]), int(steps.window[1])
        if self.kind == "steps":
            return int(min(steps.at, default=0))
        if self.kind == "every":
            return int(steps.start)
        if self.kind == "late":
            return high - (high - low) // 4
        return 0 if self.kind == "tokens" else low


def is_part(value: Any) -> bool:
    """Two shares, ascending, of [0, 1]."""
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(edge, (int, float)) and not isinstance(edge, bool) for edge in value)
        and 0 <= value[0] < value[1] <= 1
    )


def as_step(value: float, steps_total: int) -> int:
    """Turn a fraction of the run (float) into a step; leave a step (int) alone."""
    return round(value * steps_total) if isinstance(value, float) else int(value)


@dataclass(frozen=True)
class ExperimentSpec:
    """One experiment, complete: every default is filled in, so nothing changes with the code's."""

    name: str
    use: str
    hypothesis: str = ""
    items: Path | None = None
    generate: dict[str, Any] = field(default_factory=dict)
    arms: tuple[Arm, ...] = ()
    dose_in: str = "exposures"
    schedule: Schedule = Schedule()
    placement: str = "anywhere"
    placebo: str = "matched"
    block_by: tuple[str, ...] = ()
    cluster_by: str = "auto"
    probe_at: dict[str, Any] = field(default_factory=lambda: {"every": 0.1})
    margin: float | None = None
    alpha: float = ALPHA
    """The run's significance level, the same in every experiment of a run."""
    options: dict[str, Any] = field(default_factory=dict)
    role: str = "question"
    member: str | None = None
    """The member of a family whose primary outcome answers the question; None is the whole model,
    and left out of the definition, which then reads as it did before there were members.
    """
    judge_at: float | None = None
    """When the primary outcome is judged, a fraction of the run or a step; None is the end of the
    run as it was frozen, and left out of the definition of the experiment.
    """
    use_sha256: str | None = None
    """Of the source of a user's own class; None, and left out of the definition, for a built-in
    one.
    """

    test: str | None = None
    """How the primary outcome is judged (`TESTS`); None is a contrast, and left out of the
    definition.
    """
    shares_units_with: tuple[str, ...] | None = None
    """Experiments whose texts tell of the same units, on purpose; None, and left out of the
    definition, when there are none.
    """

    size_slope: bool | None = None
    """Whether the slope of the effect over the members' sizes is a further outcome, corrected with
    the primary ones; None, and left out of the definition, where it was not declared.
    """

    @property
    def doses(self) -> tuple[float, ...]:
        """Dose of every arm, in the order of the arms."""
        return tuple(arm.dose for arm in self.arms)

    def judged_step(self, steps_total: int) -> int:
        """The step at which the primary outcome is judged, in a run frozen with `steps_total`."""
        return steps_total if self.judge_at is None else as_step(self.judge_at, steps_total)

    def to_json(self) -> dict[str, Any]:
        """Everything that defines the experiment; a file of items is named by its content's hash.

        Raises OSError when the file of items cannot be read.
        """
        definition = asdict(self)
        for name in ("member", "judge_at", "use_sha256", "test", "shares_units_with", "size_slope"):
            if definition[name] is None:
                del definition[name]
        for arm in definition["arms"]:
            if arm["window"] is None:
                del arm["window"]
        if self.items is not None:
            definition["items"] = {"sha256": sha256_hex(self.items.read_bytes())}
        return json.loads(canonical_json(definition))


def n_tests(specs: Iterable[ExperimentSpec]) -> int:
    """Return how many tests Holm's method corrects for: one for each question, and one more for
    each declared slope over sizes.
    """
    return sum(1 + bool(spec.size_slope) for spec in specs if spec.role == "question")
