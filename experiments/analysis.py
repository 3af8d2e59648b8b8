"""From probe scores to answers: every outcome estimated, corrected, judged, and told in a sentence.

`analyze` makes the `answers` part of report.json; docs/statistics.md says what the numbers mean.

Shapes: U units, S probe steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.assign import Design
from motet.experiments.comparisons import Repeater
from motet.experiments.curves import dose_response, over_time, since_exposure
from motet.experiments.estimate import Comparison, Estimate, estimate
from motet.experiments.keys import name_key
from motet.experiments.library.base import Experiment, ItemScores, OutcomeSpec, Unit
from motet.experiments.power import group_scores, power
from motet.experiments.verdict import judge, placebo_sentence, positive_sentence

__all__ = ["Measured", "analyze", "power"]

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

PLACEBO_THRESHOLD = 0.01
"""An A/A p-value below this makes the run invalid: at .05 one sound run in 20 would be thrown away."""
TOLERATED_MISSING_SHARE = 0.02
"""More planned exposures than this not consumed makes an experiment invalid; fewer are a note."""
EXAMPLE_CHARACTERS = 400


@dataclass
class Measured:
    """One experiment after training. See `spec` for what a step means.

    arms, timing: int64 [U] (timing 0 early, 1 late, or None). steps: int64 [S], ascending, one
    ItemScores each. planned, consumed: int64 [U], exposures of the unit's own text (no placebos).
    exposure_steps: per unit, int64, ascending, steps of those consumed.
    """

    experiment: Experiment
    units: list[Unit]
    arms: I64
    timing: I64 | None
    design: Design
    steps: I64
    scores: list[ItemScores]
    planned: I64
    consumed: I64
    exposure_steps: list[I64]
    loss_tokens_skipped: int = 0


def analyze(
    measured: Sequence[Measured], seed: int, draws: int = 10_000, details: bool = True
) -> dict[str, Any]:
    """Return the `answers` part of report.json.

    seed: keys the repeated assignments (never the actual one). draws: repetitions per comparison;
    the smallest p-value is 1 / (draws + 1). details: False leaves out effects per arm and curves.
    """
    n_questions = sum(m.experiment.role == "question" for m in measured)
    studies = [_Study(m, seed, draws, max(1, n_questions)) for m in measured]
    entries = [study.entry(details) for study in studies]
    questions = [e for e in entries if e["role"] == "question"]
    _correct_primaries(questions)
    _correct_secondaries(questions)
    controls = {
        "placebo": _placebo(studies, entries),
        "positive": _positive(studies, entries),
    }
    invalid = " ".join(c["sentence"] for c in controls.values() if c is not None and not c["ok"])
    for study, entry in zip(studies, entries, strict=True):
        reasons = invalid if entry["role"] == "question" else ""
        reasons = " ".join(reason for reason in (reasons, study.noncompliance()) if reason)
        spec = study.m.experiment.spec
        over = len(questions) if entry["role"] == "question" else 1
        entry["verdict"] = judge(entry["primary"], spec.alpha, spec.margin, reasons, over)
    for control in controls.values():
        if control is not None:
            control["verdict"] = next(e["verdict"] for e in entries if e["name"] == control["name"])
    alphas = [study.m.experiment.spec.alpha for study in studies]
    answers = {
        "alpha": max(set(alphas), key=alphas.count) if alphas else 0.05,
        "draws": draws,
        "experiments": questions,
        "controls": controls,
        "multiplicity": {"primaries": "Holm", "secondaries": "Benjamini-Hochberg"},
    }
    return _finite(answers)


class _Study:
    """One experiment while it is being analyzed."""

    def __init__(self, m: Measured, seed: int, draws: int, n_primaries: int) -> None:
        self.m = m
        self.spec = m.experiment.spec
        self.seed = name_key(seed, "analysis", self.spec.name)
        question = m.experiment.role == "question"
        self.detect_alpha = self.spec.alpha / (n_primaries if question else 1)
        self.repeater = Repeater(m.design, m.arms, self.seed, draws)
        self.control = np.array([arm.is_control for arm in self.spec.arms])
        self.treated_U = ~self.control[m.arms]
        self.clusters_U = m.design.cluster_of_unit
        self.series = self._series()
        self.final = self._final()
        self.notes: list[str] = []

    def _series(self) -> dict[str, F64]:
        """Every measured series, float64 [S, U]; an infinite value is a missing one."""
        rows = [self.m.experiment.measure(self.m.units, scores) for scores in self.m.scores]
        names = rows[0] if rows else {}
        stacked = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in names}
        return {name: np.where(np.isfinite(v), v, np.nan) for name, v in stacked.items()}

    def _final(self) -> dict[str, F64]:
        if not self.series:
            return {}
        m = self.m
        final = m.experiment.summarize(m.units, m.arms, m.steps, self.series, m.exposure_steps)
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
        if name not in self.series or len(self.m.steps) < 2:
            return None
        first = self.spec.schedule.first_step(int(self.m.steps[-1]))
        shown = [int(when[0]) for when in self.m.exposure_steps if len(when)]
        before = np.flatnonzero(self.m.steps <= min([first, *shown]))
        if len(before) == 0 or before[-1] == len(self.m.steps) - 1:
            return None
        return self.series[name][before[-1]]

    def entry(self, details: bool = True) -> dict[str, Any]:
        """Everything the report says about this experiment, before correction and verdict."""
        outcomes = self.m.experiment.outcomes
        primary = next(outcome for outcome in outcomes if outcome.primary)
        answers = [self.outcome(outcome, details) for outcome in outcomes if outcome.secondary]
        main = self.outcome(primary, details)
        if self.m.timing is not None:
            answers.append(self.timing(primary))
        curves = self.curves(primary) if details else {}
        self.note_facts(primary, main)
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
            "arms": [self.arm_row(number) for number in range(len(self.spec.arms))],
            "primary": main,
            "secondary": answers,
            "verdict": {},
            "power": power(m.experiment, m.units, m.design, self.detect_alpha),
            "curves": curves,
            "examples": self.examples(),
            "notes": self.notes,
        }

    def arm_row(self, number: int) -> dict[str, Any]:
        members = self.m.arms == number
        return {
            "name": self.spec.arms[number].name,
            "dose": self.spec.arms[number].dose,
            "n_units": int(members.sum()),
            "n_clusters": len(np.unique(self.clusters_U[members])),
            "planned_exposures": int(self.m.planned[members].sum()),
            "consumed_exposures": int(self.m.consumed[members].sum()),
        }

    def values(self, outcome: OutcomeSpec) -> F64:
        """The outcome of every unit, float64 [U], NaN where there is none."""
        return self.final.get(outcome.name, np.full(len(self.m.units), np.nan))

    def outcome(self, outcome: OutcomeSpec, details: bool = True) -> dict[str, Any]:
        """One OUTCOME of the report."""
        values, covariate = self.values(outcome), self.baseline(outcome)
        scores = group_scores(self.m.experiment, outcome)
        found = self.estimated(outcome, values, covariate, self.repeater.groups(scores))
        result = self.fields(
            outcome, self.contrast_text(outcome), found, values, scores[self.m.arms]
        )
        result["trend"] = self.trend(outcome, values, covariate)
        if details:
            result["per_arm"] = self.per_arm(outcome, values, covariate, scores, found)
        return result

    def estimated(
        self,
        outcome: OutcomeSpec,
        values: F64,
        covariate: F64 | None,
        comparison: Comparison | None,
    ) -> Estimate:
        if comparison is None:
            return Estimate(
                None, None, None, 1.0, 0, 0, 0, None, None, False, "a group has no unit"
            )
        detect = self.detect_alpha if outcome.primary else self.spec.alpha
        found = estimate(values, covariate, comparison, self.spec.alpha, detect)
        if (
            outcome.binary
            and found.low is None
            and not found.standard_error
            and found.n_clusters > 1
        ):
            return self.share_interval(found, values, comparison)
        return found

    def share_interval(self, found: Estimate, values: F64, comparison: Comparison) -> Estimate:
        """Newcombe's interval for a difference of shares, where no unit differs within its group."""
        from statsmodels.stats.proportion import confint_proportions_2indep

        score = comparison.score[comparison.arms]
        y = values[comparison.units]
        groups = []
        for group in (score == score.max(), score == score.min()):
            kept = group & np.isfinite(y)
            n = len(np.unique(comparison.clusters[kept]))
            groups += [float(y[kept].mean()) * n, n] if n else [0.0, 0]
        if not groups[1] or not groups[3]:
            return found
        low, high = confint_proportions_2indep(*groups, method="newcomb", alpha=self.spec.alpha)
        note = "interval by Newcombe's method, because units do not differ within their group"
        return replace(found, low=float(low), high=float(high), note=note)

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
                f"({int((lost & (score_U == 1)).sum())} treated, {int((lost & (score_U == 0)).sum())} control)."
            )
        return {
            "name": outcome.name,
            "label": outcome.label,
            "unit": outcome.unit,
            "contrast": contrast,
            "effect": found.effect,
            "low": found.low,
            "high": found.high,
            "confidence": 1 - self.spec.alpha,
            "p": found.p if found.effect is not None else None,
            "p_corrected": found.p if found.effect is not None else None,
            "control_mean": float(control.mean()) if len(control) else None,
            "treated_mean": float(treated.mean()) if len(treated) else None,
            "n": found.n,
            "smallest_detectable": found.smallest_detectable,
            "assumption": self.assumption(found),
            "trend": None,
            "per_arm": [],
        }

    def assumption(self, found: Estimate) -> str:
        text = (
            f"randomization of {found.n_clusters} clusters in blocks, repeated {self.repeater.draws:,} "
            "times; the interval assumes one effect for all units, or many units"
        )
        if found.adjusted:
            text += "; adjusted for the value before exposure"
        return f"{text}; {found.note}" if found.note else text

    def contrast_text(self, outcome: OutcomeSpec) -> str:
        if outcome.contrast is not None:
            return " vs ".join(", ".join(names) for names in outcome.contrast)
        if self.m.experiment.role == "placebo":
            return " vs ".join(
                ", ".join(arm.name for arm in self.spec.arms if arm.is_control == control)
                for control in (False, True)
            )
        positive = sorted({arm.dose for arm in self.spec.arms if not arm.is_control})
        if len(positive) == 1:
            return f"dose {positive[0]:g} vs dose 0"
        return "any dose vs dose 0"

    def trend(
        self, outcome: OutcomeSpec, values: F64, covariate: F64 | None
    ) -> dict[str, Any] | None:
        """Slope per doubling of 1 + dose, when there are two or more different doses above 0."""
        levels = np.array(self.levels())
        if outcome.contrast is not None or len(np.unique(levels[levels > 0])) < 2:
            return None
        found = estimate(
            values, covariate, self.repeater.whole(np.log2(1 + levels)), self.spec.alpha
        )
        if found.effect is None:
            return None
        return {
            "slope_per_doubling": found.effect,
            "low": found.low,
            "high": found.high,
            "p": found.p,
        }

    def per_arm(
        self,
        outcome: OutcomeSpec,
        values: F64,
        covariate: F64 | None,
        scores: F64,
        overall: Estimate,
    ) -> list[dict[str, Any]]:
        """Every arm that takes part: its mean, and its effect against the control arms."""
        only_one = int((scores == 1).sum()) == 1
        control = np.flatnonzero(scores == 0).tolist()
        rows = []
        for number in np.flatnonzero(np.isfinite(scores)).tolist():
            arm = self.spec.arms[number]
            mine = values[self.m.arms == number]
            mine = mine[np.isfinite(mine)]
            row: dict[str, Any] = {"arm": arm.name, "dose": arm.dose}
            row["mean"] = float(mine.mean()) if len(mine) else None
            row |= {"effect": None, "low": None, "high": None, "p": None, "n": len(mine)}
            if scores[number] == 1:
                found = overall
                if not only_one:
                    pair = self.repeater.some([number], control)
                    found = self.estimated(replace(outcome, primary=False), values, covariate, pair)
                row |= {"effect": found.effect, "low": found.low, "high": found.high}
                row["p"] = found.p if found.effect is not None else None
            rows.append(row)
        return rows

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
        m, alpha = self.m, self.spec.alpha
        names = [arm.name for arm in self.spec.arms]
        dose = dose_response(
            self.values(primary),
            m.arms,
            self.clusters_U,
            names,
            self.levels(),
            alpha,
            primary.binary,
        )
        known = {outcome.name: outcome for outcome in m.experiment.outcomes}
        times = []
        for name, values in self.series.items():
            spec = known.get(name)
            times.append(
                {
                    "outcome": name,
                    "label": spec.label if spec else name,
                    "unit": spec.unit if spec else primary.unit,
                    "series": over_time(
                        values,
                        m.steps,
                        m.arms,
                        self.clusters_U,
                        names,
                        alpha,
                        bool(spec and spec.binary),
                    ),
                }
            )
        return {
            "dose_response": dose | {"label": primary.label, "unit": primary.unit},
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
        curve, sentence = since_exposure(
            self.series[name],
            self.m.steps,
            highest,
            ~self.treated_U,
            self.clusters_U,
            self.m.exposure_steps,
            self.spec.alpha,
            self.seed,
        )
        if sentence:
            self.notes.append(sentence)
        label = f"gain since the last exposure, dose {most:g} over dose 0"
        return None if curve is None else curve | {"label": label, "unit": primary.unit}

    def note_facts(self, primary: OutcomeSpec, main: dict[str, Any]) -> None:
        """What a reader must know beside the numbers."""
        empty = [
            arm.name
            for number, arm in enumerate(self.spec.arms)
            if not (self.m.arms == number).any()
        ]
        if empty:
            self.notes.append(f"No unit was assigned to: {', '.join(empty)}.")
        smallest = smallest_p(self.repeater, group_scores(self.m.experiment, primary))
        if smallest > self.detect_alpha:
            self.notes.append(
                f"The design is so small that no result can have a p-value below {smallest:.2g}; "
                f"{self.detect_alpha:.2g} is needed. More units or clusters are needed to find anything."
            )
        missing = int(np.maximum(self.m.planned - self.m.consumed, 0).sum())
        if missing:
            self.notes.append(
                f"{missing} of {int(self.m.planned.sum())} planned exposures were not consumed; "
                "units are compared as they were assigned."
            )
        if self.m.loss_tokens_skipped:
            self.notes.append(
                f"{self.m.loss_tokens_skipped:,} exposure tokens were in skipped updates."
            )
        largest = int(np.bincount(self.clusters_U).max(initial=0))
        if largest * 4 > len(self.m.units) and self.m.design.n_clusters > 1:
            self.notes.append(f"One cluster of near-duplicates holds {largest} of the units.")

    def noncompliance(self) -> str:
        """Why the exposures that were consumed make the comparison meaningless, or ""."""
        planned, consumed = self.m.planned, self.m.consumed
        leaked = int((consumed[~self.treated_U] > 0).sum())
        if leaked:
            return f"{leaked} held-out units were shown in training."
        extra = int(np.maximum(consumed - planned, 0).sum())
        if extra:
            return f"{extra} exposures were consumed more often than planned."
        missing = int(np.maximum(planned - consumed, 0).sum())
        if missing > TOLERATED_MISSING_SHARE * max(1, int(planned.sum())):
            return f"{missing} of {int(planned.sum())} planned exposures were not consumed."
        return ""

    def examples(self) -> list[dict[str, str]]:
        """One unit of each arm, the first by id."""
        found = []
        for number, arm in enumerate(self.spec.arms):
            members = [self.m.units[i] for i in np.flatnonzero(self.m.arms == number).tolist()]
            if members:
                unit = min(members, key=lambda member: member.id)
                text = unit.texts[0]
                short = text if len(text) <= EXAMPLE_CHARACTERS else text[:EXAMPLE_CHARACTERS] + "…"
                found.append({"unit": unit.id, "arm": arm.name, "text": short})
        return found


def smallest_p(repeater: Repeater, scores: F64) -> float:
    """The smallest p-value that any outcome could have, from the number of distinct assignments.

    Counted for two groups of clusters within blocks; when all blocks are split in half, an
    assignment and its mirror image give the same statistic.
    """
    _, first = np.unique(repeater.design.cluster_of_unit, return_index=True)
    score = scores[repeater.arms_U[first]]
    blocks = repeater.blocks_U[first]
    log_count, mirrored = 0.0, True
    for block in np.unique(blocks):
        here = score[blocks == block]
        treated, control = int((here == 1).sum()), int((here == 0).sum())
        log_count += math.log(math.comb(treated + control, treated))
        mirrored &= treated == control
    ways = math.exp(min(log_count, 50.0))
    return min(1.0, max((2.0 if mirrored else 1.0) / ways, 1.0 / (1 + repeater.draws)))


def _correct_primaries(entries: Sequence[dict[str, Any]]) -> None:
    """Holm over the primary outcomes of the questions; one without an estimate counts as p = 1."""
    from statsmodels.stats.multitest import multipletests

    outcomes = [entry["primary"] for entry in entries]
    if outcomes:
        raw = [1.0 if outcome["p"] is None else outcome["p"] for outcome in outcomes]
        for outcome, p in zip(outcomes, multipletests(raw, method="holm")[1], strict=True):
            outcome["p_corrected"] = None if outcome["p"] is None else float(p)


def _correct_secondaries(entries: Sequence[dict[str, Any]]) -> None:
    """Benjamini-Hochberg over all secondary outcomes of the questions that have an estimate."""
    from statsmodels.stats.multitest import multipletests

    outcomes = [o for entry in entries for o in entry["secondary"] if o["p"] is not None]
    if outcomes:
        corrected = multipletests([outcome["p"] for outcome in outcomes], method="fdr_bh")[1]
        for outcome, p in zip(outcomes, corrected, strict=True):
            outcome["p_corrected"] = float(p)


def _placebo(studies: Sequence[_Study], entries: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The A/A control; of several, the one with the smallest p, which is multiplied by their number."""
    found = [entry for entry in entries if entry["role"] == "placebo"]
    if not found:
        return None
    worst = min(found, key=lambda e: 2.0 if e["primary"]["p"] is None else e["primary"]["p"])
    p = worst["primary"]["p"]
    corrected = None if p is None else min(1.0, p * len(found))
    worst["primary"]["p_corrected"] = corrected
    ok, sentence = placebo_sentence(corrected, PLACEBO_THRESHOLD, _alpha_of(studies, worst))
    return worst | {"ok": ok, "sentence": sentence}


def _positive(
    studies: Sequence[_Study], entries: Sequence[dict[str, Any]]
) -> dict[str, Any] | None:
    """The positive control; of several, the one with the largest p: all must be found."""
    found = [entry for entry in entries if entry["role"] == "positive_control"]
    if not found:
        return None
    worst = max(found, key=lambda e: 2.0 if e["primary"]["p"] is None else e["primary"]["p"])
    ok, sentence = positive_sentence(worst["primary"], _alpha_of(studies, worst))
    return worst | {"ok": ok, "sentence": sentence}


def _alpha_of(studies: Sequence[_Study], entry: dict[str, Any]) -> float:
    return next(study.spec.alpha for study in studies if study.spec.name == entry["name"])


def _finite(value: Any) -> Any:
    """Plain Python values for JSON; NaN and infinity become null."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(inner) for inner in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if math.isfinite(value) else None
    return value
