"""Knowledge acquisition: fictional facts, shown once, ten times alike, or in ten wordings.

Source: Chang et al., "How Do Large Language Models Acquire Factual Knowledge During Pretraining?"
(arXiv 2406.11813): injection every 100 steps, ten times, at the start of a sequence;
log-probability of memorization, semantic and compositional probes; effectivity and retainability
(with outliers removed by the interquartile rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from motet.core.errors import Problem
from motet.experiments.design.experiment import Experiment, log_grid
from motet.experiments.design.units import texts_of
from motet.experiments.library import generate
from motet.experiments.types import (
    F64,
    I64,
    ItemScores,
    ItemTable,
    OutcomeSpec,
    ProbeItem,
    Unit,
    per_token,
)

KINDS = ("semantic", "memorization", "compositional")
LABELS = {
    "semantic": "log-probability of the fact in a new wording",
    "memorization": "log-probability of the fact in the original wording",
    "compositional": "log-probability of a fact that combines two facts",
}


@dataclass(frozen=True)
class KnowledgeOptions:
    """probes_per_kind: at most so many of each kind are measured per unit. dense_probes: probe
    before the first and right after every injection, and on a log grid after the last. variants:
    wordings of an invented document, the original included."""

    probes_per_kind: int = 5
    dense_probes: bool = True
    variants: int = 10


class Knowledge(Experiment):
    """Acquisition and retention of facts."""

    description = "how facts are learned from repetition or paraphrase, and kept"
    protocol = (
        "Each unit is a document of invented facts, held out, shown once, shown again unchanged, "
        "or "
        "shown in different wordings; probes ask for the facts in the same and in new words."
    )
    follows_exposure = True
    Options: ClassVar[type[Any]] = KnowledgeOptions
    fields: ClassVar[dict[str, tuple[type, ...]]] = {"text": (str,), "semantic": (list,)}
    optional_fields: ClassVar[dict[str, tuple[type, ...]]] = {
        "paraphrases": (list,),
        "memorization": (list,),
        "compositional": (list,),
    }
    defaults: ClassVar[dict[str, Any]] = {
        "hypothesis": "Facts are learned from text, and paraphrases generalize better than copies.",
        "generate": {"count": 160, "seed": 0},
        "arms": [
            {"name": "held_out", "dose": 0},
            {"name": "once", "dose": 1},
            {"name": "duplicate", "dose": 10, "variants": "same"},
            {"name": "paraphrase", "dose": 10, "variants": "cycle"},
        ],
        "schedule": {"kind": "every", "every": 100, "start": 100},
        "placement": "start",
        "probe_at": {"every": 0.1},
    }

    def definition_problems(self) -> list[Problem]:
        where = f"experiments.{self.spec.name}.options"
        found = []
        for name in ("probes_per_kind", "variants"):
            if not 1 <= getattr(self.options, name) <= 50:
                message = f"is {getattr(self.options, name)}; it must be 1 to 50"
                found.append(Problem(f"{where}.{name}", message))
        if self.options.variants > 33:
            found.append(Problem(f"{where}.variants", "is above 33, more than there are wordings"))
        return found

    @property
    def outcomes(self) -> tuple[OutcomeSpec, ...]:
        outcomes = [
            OutcomeSpec(
                kind,
                LABELS[kind],
                "nats/token",
                "better known",
                primary=kind == "semantic",
                secondary=kind != "semantic",
            )
            for kind in KINDS
        ]
        if self.spec.schedule.kind == "every":
            outcomes.append(self._effectivity())
        if {"paraphrase", "duplicate"} <= {arm.name for arm in self.spec.arms}:
            outcomes += _by_wording()
        return tuple(outcomes)

    def _effectivity(self) -> OutcomeSpec:
        many = tuple(arm.name for arm in self.spec.arms if arm.dose > 1)
        held_out = tuple(arm.name for arm in self.spec.arms if arm.is_control)
        return OutcomeSpec(
            "effectivity",
            "gain from just before to right after an injection, new wording",
            "nats/token",
            "more learned per injection",
            contrast=(many, held_out) if many else None,
            baseline="semantic",
        )

    def generate_rows(self, count: int, seed: int) -> list[dict[str, Any]]:
        path = (self.spec.use, self.spec.name, seed)
        return [
            {
                "id": document.id,
                "text": document.texts[0],
                "paraphrases": document.texts[1:],
                "memorization": _pairs(document.sentences),
                "semantic": _pairs(document.semantic),
                "compositional": _pairs(document.compositional),
            }
            for document in generate.documents(path, count, self.options.variants)
        ]

    def unit_of(self, row: Mapping[str, Any]) -> Unit:
        texts = (row["text"].strip(), *texts_of(row, "paraphrases"))
        cycled = any(arm.variants == "cycle" and arm.dose > 0 for arm in self.spec.arms)
        if cycled and len(texts) < 2:
            raise ValueError("has no paraphrases, which an arm with variants: cycle needs")
        items = [
            ProbeItem(f"{kind}-{number}", kind, prompt.rstrip(), f" {target.strip()}")
            for kind in KINDS
            for number, (prompt, target) in enumerate(probe_pairs(row, kind))
            if number < self.options.probes_per_kind
        ]
        return Unit(row["id"], texts, tuple(items))

    def measure(self, units: Sequence[Unit], scores: ItemScores) -> dict[str, F64]:
        table, values = ItemTable(units), per_token(scores)
        return {kind: table.mean(values, kind) for kind in KINDS}

    def summarize(
        self,
        units: Sequence[Unit],
        arms: I64,
        steps: I64,
        series: Mapping[str, F64],
        exposure_steps: Sequence[I64],
    ) -> dict[str, F64]:
        final = {kind: series[kind][-1] for kind in KINDS}
        final["semantic_by_wording"] = series["semantic"][-1]
        final["retainability"] = retainability(steps, series["semantic"], exposure_steps)
        if self.spec.schedule.kind == "every":
            shown = [when for when in exposure_steps if len(when)]
            times = (
                np.unique(np.concatenate(shown)) if shown else self.injection_steps(int(steps[-1]))
            )
            final["effectivity"] = effectivity(steps, series["semantic"], times)
        return final

    def injection_steps(self, steps_total: int) -> I64:
        """Steps of all injections of the highest dose under `every`, whatever a unit's arm."""
        schedule = self.spec.schedule.resolve(steps_total)
        most = int(max(self.spec.doses)) if self.spec.dose_in == "exposures" else 1
        times = int(schedule.start) + int(schedule.every) * np.arange(most, dtype=np.int64)
        return times[times < steps_total]

    def probe_steps(self, steps_total: int) -> set[int]:
        wanted = super().probe_steps(steps_total)
        if self.options.dense_probes and self.spec.schedule.kind == "every":
            times = self.injection_steps(steps_total)
            if len(times):
                wanted |= {int(times[0]), *(int(step) + 1 for step in times)}
                wanted |= log_grid(int(times[-1]), steps_total, 6)
        return {step for step in wanted if 0 <= step <= steps_total}


def _by_wording() -> list[OutcomeSpec]:
    """Return the outcomes that compare paraphrases to copies."""
    contrast = (("paraphrase",), ("duplicate",))
    return [
        OutcomeSpec(
            "semantic_by_wording",
            "log-probability in a new wording, paraphrases against copies",
            "nats/token",
            "better known",
            contrast=contrast,
            baseline="semantic",
        ),
        OutcomeSpec(
            "retainability",
            "share of the peak gain that is kept, paraphrases against copies",
            "share of peak gain",
            "better kept",
            contrast=contrast,
            baseline="",
        ),
    ]


def _pairs(pairs: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"prompt": prompt, "target": target.strip()} for prompt, target in pairs]


def probe_pairs(row: Mapping[str, Any], kind: str) -> list[tuple[str, str]]:
    """The (prompt, target) pairs of one kind of probe. ValueError names what is malformed."""
    pairs = []
    for probe in row.get(kind) or []:
        good = isinstance(probe, Mapping) and all(
            isinstance(probe.get(key), str) and probe[key].strip() for key in ("prompt", "target")
        )
        if not good:
            raise ValueError(
                f"has in {kind} {probe!r:.80}; it must be {{prompt: text, target: text}}"
            )
        pairs.append((probe["prompt"], probe["target"]))
    return pairs


def effectivity(steps: I64, values_SU: F64, times: I64) -> F64:
    """Mean over injections of the gain from the last probe before to the first probe after, [U].

    The same times for every unit, so that held-out units are measured alike. An injection counts
    when a probe lies between it and the next one, and one between it and the previous one.
    """
    gains = []
    edges = [-1, *times.tolist(), int(steps[-1]) + 1]
    for number, time in enumerate(times.tolist()):
        before = np.flatnonzero((steps <= time) & (steps > edges[number]))
        after = np.flatnonzero((steps > time) & (steps <= edges[number + 2]))
        if len(before) and len(after):
            gains.append(values_SU[after[0]] - values_SU[before[-1]])
    return np.mean(gains, axis=0) if gains else np.full(values_SU.shape[1], np.nan)


def retainability(steps: I64, values_SU: F64, exposure_steps: Sequence[I64]) -> F64:
    """(last - init) / (peak - init) per unit, float64 [U]; NaN where it means nothing.

    init: last probe up to the first exposure. peak: highest probe after it. A unit without
    exposures or probes around them has none, nor has one whose gain at the peak is below a tenth of
    the median gain (the denominator vanishes). Outliers beyond 1.5 interquartile ranges are removed
    over all units together, blind to the arm.
    """
    n_units = values_SU.shape[1]
    gain, kept = np.full(n_units, np.nan), np.full(n_units, np.nan)
    for unit, when in enumerate(exposure_steps):
        if len(when) == 0:
            continue
        before = np.flatnonzero(steps <= np.min(when))
        after = np.flatnonzero(steps > np.min(when))
        if len(before) == 0 or len(after) == 0:
            continue
        start = values_SU[before[-1], unit]
        track = values_SU[after, unit]
        if np.isfinite(start) and np.any(np.isfinite(track)):
            gain[unit] = np.nanmax(track) - start
            kept[unit] = track[-1] - start
    if not np.any(gain > 0):
        return np.full(n_units, np.nan)
    smallest = 0.1 * float(np.median(gain[gain > 0]))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = np.where(gain >= smallest, kept / gain, np.nan)
    return without_outliers(ratio)


def without_outliers(values: F64) -> F64:
    """NaN where a value lies more than 1.5 interquartile ranges outside the quartiles."""
    finite = values[np.isfinite(values)]
    if len(finite) < 4:
        return values
    low, high = np.quantile(finite, [0.25, 0.75])
    reach = 1.5 * (high - low)
    inside = (values >= low - reach) & (values <= high + reach)
    return np.where(inside, values, np.nan)
