"""The answer of one experiment on one member: every outcome estimated, with curves, before
correction and verdict.

Shapes: U units, S probe steps.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis import curves as means
from motet.experiments.analysis.by_arm import contrast_text, per_arm
from motet.experiments.analysis.coverage import coverage_note, known_coverage
from motet.experiments.analysis.declared import (
    comparison_of,
    estimate_by,
    group_scores,
    primary_of,
)
from motet.experiments.analysis.detectable import Detectable
from motet.experiments.analysis.estimates import Comparison, Estimate, estimate
from motet.experiments.analysis.kept import detectable_of, known_power
from motet.experiments.analysis.measured import Measured, arm_row, examples, notes, smallest_p_of
from motet.experiments.analysis.negative import last_before_exposure, negative_control
from motet.experiments.analysis.power import Assumed
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.analysis.shares import share_interval, within, within_range
from motet.experiments.design.declared import declared_test
from motet.experiments.design.spec import ALPHA
from motet.experiments.design.trial import final_of, series_of
from motet.experiments.stream.random import name_key
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
OUTSIDE = 0.05
CONFIDENCE = 1 - OUTSIDE
"""Of every interval, whatever the run's alpha: a margin is judged by two one-sided tests at 2.5 %
each, which a lax alpha must not make easier.
"""


class Answer:
    """One experiment on one member while it is being analyzed.

    Args:
        m: the experiment after training.
        seed: keys the repeated assignments.
        draws: how often the assignment is repeated.
        n_primaries: over how many primary outcomes Holm's method corrects.
        alpha: the run's significance level.
        repeater: of the same experiment on another member. All members saw one assignment, so they
            share its repetitions, which also makes their estimates comparable draw by draw.
        simulations: studies that the smallest detectable effect is simulated with; 0 = it is not;
            None = enough of them, unless the user's cache has the figures.
    """

    def __init__(
        self,
        m: Measured,
        seed: int,
        draws: int,
        n_primaries: int,
        alpha: float = ALPHA,
        repeater: Repeater | None = None,
        simulations: int | None = 0,
    ) -> None:
        self.m = m
        self.member = m.member
        self.simulations = simulations
        self.spec = m.experiment.spec
        self.seed = name_key(seed, "analysis", self.spec.name)
        question = m.experiment.role == "question"
        self.alpha = alpha
        self.detect_alpha = alpha / (n_primaries if question else 1)
        self.repeater = repeater or Repeater(m.design, m.arms, self.seed, draws)
        self.control = np.array([arm.is_control for arm in self.spec.arms])
        self.treated_U = ~self.control[m.arms]
        self.clusters_U = m.design.cluster_of_unit
        self.series = self._series()
        self.final = self._final()
        self.notes: list[str] = []

    def _series(self) -> dict[str, F64]:
        """Every measured series, float64 [S, U]; an infinite value is a missing one."""
        rows = [series_of(self.m.experiment, self.m.units, scores) for scores in self.m.scores]
        names = rows[0] if rows else {}
        stacked = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
        return {name: np.where(np.isfinite(v), v, np.nan) for name, v in stacked.items()}

    def _final(self) -> dict[str, F64]:
        if not self.series:
            return {}
        m = self.m
        final = final_of(m.experiment, m.units, m.arms, m.steps, self.series, m.exposure_steps)
        return {name: np.where(np.isfinite(v), v, np.nan) for name, v in final.items()}

    def levels(self) -> list[float]:
        """Dose of every arm as exposures per unit."""
        doses = []
        for number, arm in enumerate(self.spec.arms):
            dose = arm.dose
            members = self.m.planned[self.m.arms == number]
            if self.spec.dose_in != "exposures" and not arm.is_control and members.sum() > 0:
                dose = float(members.mean())
            doses.append(float(dose))
        return doses

    def baseline(self, outcome: OutcomeSpec) -> F64 | None:
        """The covariate: the series at the last probe before any exposure could happen, [U]."""
        name = outcome.name if outcome.baseline is None else outcome.baseline
        place = last_before_exposure(self.m)
        if name not in self.series or place is None or place == len(self.m.steps) - 1:
            return None
        return self.series[name][place]

    def negative_control(self, primary: OutcomeSpec) -> dict[str, Any]:
        """The primary outcome's own test before any exposure."""
        return negative_control(
            self.m,
            self.series,
            primary,
            contrast_text(self.m, primary.contrast, declared_test(self.m.experiment, primary)),
            partial(self.declared, replace(primary, primary=False)),
        )

    def entry(self, details: bool = True) -> dict[str, Any]:
        """Everything the report says about this experiment, before correction and verdict."""
        primary = primary_of(self.m.experiment)
        main, answers = self.estimates(primary, details)
        curves = self.curves(primary) if details else {}
        self.notes += notes(self.m, self.repeater, self.detect_alpha, primary)
        m = self.m
        return {
            "name": self.spec.name,
            "use": self.spec.use,
            "role": m.experiment.role,
            "hypothesis": self.spec.hypothesis,
            "protocol": m.experiment.protocol,
            "n_units": len(m.units),
            "n_clusters": m.design.n_clusters,
            "n_blocks": m.design.n_blocks,
            "arms": [arm_row(self.m, number) for number in range(len(self.spec.arms))],
            "primary": main,
            "secondary": answers,
            "negative_control": self.negative_control(primary),
            "verdict": {},
            "power": {},
            "curves": curves,
            "examples": examples(m),
            "notes": self.notes,
        }

    def power(self, assumed: Assumed) -> dict[str, Any]:
        """The smallest detectable effect as it was before training, `{}` without simulations."""
        of = (self.m.experiment, self.repeater, self.detect_alpha)
        return known_power(*of, assumed, self.simulations)

    def further(self) -> dict[str, Any]:
        """What the report says about a member that the answer is not for: the same outcomes, all
        of them exploratory, without curves; and its own negative control.
        """
        primary = replace(primary_of(self.m.experiment), primary=False)
        main, answers = self.estimates(primary, details=False)
        found = {"member": self.member, "primary": main, "secondary": answers}
        return {**found, "negative_control": self.negative_control(primary)}

    def estimates(
        self, primary: OutcomeSpec, details: bool
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(the primary OUTCOME, the other OUTCOMEs)."""
        outcomes = self.m.experiment.outcomes
        answers = [self.outcome(outcome, details) for outcome in outcomes if outcome.secondary]
        main = self.outcome(primary, details)
        if self.m.timing is not None:
            answers.append(self.timing(primary))
        return main, answers

    def smallest_p(self) -> float:
        """The smallest p-value that the primary outcome could have in this design."""
        experiment = self.m.experiment
        return smallest_p_of(experiment, primary_of(experiment), self.repeater)

    def values(self, outcome: OutcomeSpec) -> F64:
        """The outcome of every unit, float64 [U], NaN where there is none."""
        return self.final.get(outcome.name, np.full(len(self.m.units), np.nan))

    def outcome(self, outcome: OutcomeSpec, details: bool = True) -> dict[str, Any]:
        """One OUTCOME of the report."""
        values, covariate = self.values(outcome), self.baseline(outcome)
        scores = group_scores(self.m.experiment, outcome)
        test = declared_test(self.m.experiment, outcome)
        found = self.declared(outcome, values, covariate)
        contrast = contrast_text(self.m, outcome.contrast, test)
        result = self.fields(outcome, contrast, found, values, scores[self.m.arms])
        if test != "contrast":
            result["test"] = test
        if outcome.primary:
            size = self.detectable(outcome, values, covariate, found)
            result |= {"smallest_detectable": size.size, "detectable_power": size.power}
        result["trend"] = self.trend(outcome, values, covariate)
        if details or found.arms:

            def pair(arm: int) -> Estimate:
                control = np.flatnonzero(scores == 0).tolist()
                two = self.repeater.some([arm], control)
                return self.estimated(replace(outcome, primary=False), values, covariate, two)

            result["per_arm"] = per_arm(self.m, values, scores, found, pair)
        return result

    def detectable(
        self, outcome: OutcomeSpec, values: F64, covariate: F64 | None, found: Estimate
    ) -> Detectable:
        """The smallest effect on the primary outcome that 4 of 5 such runs would have found."""
        if self.simulations == 0:
            return Detectable(found.smallest_detectable)
        of = (self.m.experiment, self.repeater, outcome, values, covariate, found)
        return detectable_of(*of, self.detect_alpha, self.seed, self.simulations)

    def declared(self, outcome: OutcomeSpec, values: F64, covariate: F64 | None) -> Estimate:
        """The estimate by the test that the experiment declared."""
        test = declared_test(self.m.experiment, outcome)
        comparison = comparison_of(self.m.experiment, outcome, self.repeater)
        return self.estimated(outcome, values, covariate, comparison, test)

    def estimated(
        self,
        outcome: OutcomeSpec,
        values: F64,
        covariate: F64 | None,
        comparison: Comparison | None,
        test: str = "contrast",
    ) -> Estimate:
        if comparison is None:
            return Estimate(
                None, None, None, 1.0, 0, 0, 0, None, None, False, "a group has no unit"
            )
        detect = self.detect_alpha if outcome.primary else self.alpha
        found = estimate_by(test, values, covariate, comparison, OUTSIDE, detect)
        if test == "contrast":
            if outcome.binary:
                found = share_interval(found, values, comparison, OUTSIDE)
            else:
                found = within_range(found, values, comparison, outcome.range)
            held = known_coverage(found, values, comparison, outcome.binary)
            return replace(found, coverage=held)
        span = float(np.ptp(comparison.score)) if test == "trend" else 1.0
        return within(found, outcome.reach / span)

    def fields(
        self, outcome: OutcomeSpec, contrast: str, found: Estimate, values: F64, score_U: F64
    ) -> dict[str, Any]:
        """The fields of an OUTCOME that every comparison has."""
        measured = np.isfinite(values)
        control, treated = values[measured & (score_U == 0)], values[measured & (score_U == 1)]
        if found.n_dropped:
            lost = ~measured & np.isfinite(score_U)
            self.notes.append(
                f"{outcome.label}: {found.n_dropped} units have no value and are left out "
                f"({int((lost & (score_U == 1)).sum())} treated, "
                f"{int((lost & (score_U == 0)).sum())} control)."
            )
        return {
            "name": outcome.name,
            "label": outcome.label,
            "unit": outcome.unit,
            "contrast": contrast,
            "effect": found.effect,
            "low": found.low,
            "high": found.high,
            "confidence": CONFIDENCE,
            "p": found.p if found.answered else None,
            "p_corrected": found.p if found.answered else None,
            "control_mean": float(control.mean()) if len(control) else None,
            "treated_mean": float(treated.mean()) if len(treated) else None,
            "n": found.n,
            "smallest_detectable": None,
            "detectable_power": None,
            "assumption": self.assumption(found),
            "trend": None,
            "per_arm": [],
            "coverage_note": None if found.coverage is None else coverage_note(found.coverage),
        }

    def assumption(self, found: Estimate) -> str:
        text = (
            f"randomization of {found.n_clusters} clusters in blocks, repeated "
            f"{self.repeater.draws:,} "
            "times; the interval assumes one effect for all units"
        )
        if found.coverage is None:
            text += ", or more units than a handful in each group"
        else:
            text += f"; {coverage_note(found.coverage)}"
        if found.arms:
            text += "; intervals and p-values per arm hold for all arms together"
        if found.adjusted:
            text += "; adjusted for the value before exposure"
        return f"{text}; {found.note}" if found.note else text

    def trend(
        self, outcome: OutcomeSpec, values: F64, covariate: F64 | None
    ) -> dict[str, Any] | None:
        """Slope per doubling of 1 + dose, when there are two or more different doses above 0."""
        levels = np.array(self.levels())
        if outcome.contrast is not None or len(np.unique(levels[levels > 0])) < 2:
            return None
        score = np.log2(1 + levels)
        found = estimate(values, covariate, self.repeater.whole(score), OUTSIDE)
        found = within(found, outcome.reach / float(np.ptp(score)))
        if found.effect is None:
            return None
        return {
            "slope_per_doubling": found.effect,
            "low": found.low,
            "high": found.high,
            "p": found.p,
        }

    def timing(self, primary: OutcomeSpec) -> dict[str, Any]:
        """Late against early exposure among treated units, as a secondary outcome."""
        assert self.m.timing is not None
        values, covariate = self.values(primary), self.baseline(primary)
        outcome = replace(
            primary, name="timing", label=f"{primary.label}, late against early", primary=False
        )
        comparison = self.repeater.timing(self.m.timing, self.treated_U)
        found = self.estimated(outcome, values, covariate, comparison)
        score_U = np.where(self.treated_U, self.m.timing.astype(np.float64), np.nan)
        return self.fields(outcome, "late vs early exposure", found, values, score_U)

    def curves(self, primary: OutcomeSpec) -> dict[str, Any]:
        m, alpha = self.m, OUTSIDE
        names = [arm.name for arm in self.spec.arms]
        dose = means.dose_response(
            self.values(primary),
            m.arms,
            self.clusters_U,
            names,
            self.levels(),
            alpha,
            primary.binary,
            primary.range,
        )
        known = {outcome.name: outcome for outcome in m.experiment.outcomes}
        times = []
        for name, values in self.series.items():
            spec = known.get(name)
            ends = spec.range if spec else means.ENDLESS
            times.append(
                {
                    "outcome": name,
                    "label": spec.label if spec else name,
                    "unit": spec.unit if spec else primary.unit,
                    "series": means.over_time(
                        values,
                        m.steps,
                        m.arms,
                        self.clusters_U,
                        names,
                        alpha,
                        bool(spec and spec.binary),
                        ends,
                    ),
                    "range": means.shown_range(ends),
                }
            )
        return {
            "dose_response": dose | means.named(primary),
            "over_time": times,
            "since_exposure": self.since(primary),
        }

    def since(self, primary: OutcomeSpec) -> dict[str, Any] | None:
        """The effect against steps since exposure, of the arms with the highest dose."""
        name = primary.baseline or primary.name
        if not self.m.experiment.follows_exposure or name not in self.series:
            return None
        most = max(self.spec.doses)
        highest = np.array([arm.dose == most for arm in self.spec.arms])[self.m.arms]
        curve, sentence = means.since_exposure(
            self.series[name],
            self.m.steps,
            highest,
            ~self.treated_U,
            self.clusters_U,
            self.m.exposure_steps,
            OUTSIDE,
            self.seed,
            primary.range if name == primary.name else means.ENDLESS,
        )
        if sentence:
            self.notes.append(sentence)
        label = f"gain since the last exposure, dose {most:g} over dose 0"
        return None if curve is None else curve | {"label": label, "unit": primary.unit}
