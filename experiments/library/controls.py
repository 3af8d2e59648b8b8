"""The two controls that every run carries: one must find nothing, the other must be found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from motet.experiments.library.memorization import Canaries, CanaryOptions
from motet.experiments.types import F64, ItemScores, ItemTable, OutcomeSpec, Unit, per_token


@dataclass(frozen=True)
class ControlOptions(CanaryOptions):
    """As for canaries; controls need no references, their outcome is the log-probability."""

    n_references: int = 0
    format: str = "The storage number of {holder} is"


class _CanaryControl(Canaries):
    Options: ClassVar[type[Any]] = ControlOptions

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        return (
            OutcomeSpec(
                "logprob",
                "log-probability of the secret",
                "nats/token",
                "more likely",
                primary=True,
                secondary=False,
            ),
        )

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        return {"logprob": ItemTable(units).mean(per_token(scores), "secret")}


class Placebo(_CanaryControl):
    """A/A: labels are randomized, but no unit's text is ever shown. It must find nothing."""

    description = "A/A control: random labels without treatment, must find nothing"
    protocol = (
        "Each unit is a secret that is never shown; arm b gets exposures of ordinary base text "
        "instead, so any difference between the arms is chance or a fault."
    )
    role = "placebo"
    inserts_units = False
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Nothing was done to these units, so nothing is found.",
        "generate": {"count": 64, "seed": 0},
        "arms": [{"name": "a", "dose": 0}, {"name": "b", "dose": 4}],
        "schedule": {"kind": "uniform", "window": [0.0, 0.9]},
        "placebo": "none",
        "probe_at": {"fractions": [0.5]},
    }


class PositiveControl(_CanaryControl):
    """Canaries at a dose that any working run must reveal."""

    description = "positive control: canaries at a high dose, must be found"
    protocol = (
        "Each unit is a secret in a fixed format, shown many times or never; a run in which this "
        "effect is not found cannot find subtler ones."
    )
    role = "positive_control"
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Secrets shown 64 times are more likely than secrets never shown.",
        "generate": {"count": 16, "seed": 0},
        "doses": [0, 64],
        "schedule": {"kind": "uniform", "window": [0.0, 1.0]},
        "probe_at": {"fractions": [0.5]},
    }
