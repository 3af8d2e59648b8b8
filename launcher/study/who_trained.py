"""Who trains on what, asked of a frozen run's family once more: for the audit and the doses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from motet.core.files import read_json
from motet.experiments.design.assignment import Question
from motet.experiments.stream.audit import Compliance
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.experiments.stream.who_trained import Contains, Drawn, Together, doses
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.families import open_family, refuse_other_multipliers
from motet.launcher.runs.rundir import RunDir
from motet.models.config import ModelConfig
from motet.models.family.base import WHOLE, Choice, Family, Member, choices, members_of
from motet.models.family.costs import passes_of, term_flops
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.space import lies_in
from motet.models.member import Term, name_of, trained_by

DRAWS_KEPT = 1 << 16


class FamilyDraws:
    """The draws of a run's family, made again from its frozen settings.

    Args:
        run, settings, manifest: of the run.
        step: of a checkpoint, which says in how many shares it was drawn where the ledger is of a
            version that does not.

    Raises:
        UserError: the source of its class is missing or altered, or it makes other members now.
    """

    def __init__(
        self, run: RunDir, settings: RunSettings, manifest: Mapping[str, Any], step: int
    ) -> None:
        self._family: Family | None = None
        self._members: dict[str, Member] = {}
        if settings.family.kind != WHOLE and not manifest.get("guest"):
            self._family, self._members = open_family(run, settings, manifest)
            facts = read_json(run.checkpoint(step) / "manifest.json")
            self._number = int(facts.get("draws") or 1)
            if isinstance(self._family, ProgressiveFamily) and (stage := facts.get("stage")):
                refuse_other_multipliers(self._family, stage, str(run.checkpoint(step)))
        self._choices = lru_cache(DRAWS_KEPT)(self._chosen)

    def choices(self, step: int, draws: int | None = None) -> list[Choice] | None:
        """Return who trains on each equal share of a step; None: the whole model alone."""
        return self._choices(step, draws)

    def _chosen(self, step: int, draws: int | None) -> list[Choice] | None:
        if self._family is None:
            return None
        return choices(self._family, self._members, step, draws or self._number)

    def stage(self, step: int) -> str:
        """Return the name of the stage of a step; "" where nothing grows."""
        family = self._family
        if not isinstance(family, ProgressiveFamily):
            return ""
        return family.stages[family.number_at(step)].label

    def drawn(self, step: int, draws: int | None) -> Sequence[Together]:
        """Return the names of those who train, see `experiments.stream.who_trained.Drawn`."""
        found = self.choices(step, draws)
        return [(None,)] if found is None else [trained_by(choice) for choice in found]


def drawn_again(
    run: RunDir, settings: RunSettings, manifest: Mapping[str, Any], step: int
) -> Drawn:
    """Return the draws of a run for its audit; see `FamilyDraws`."""
    return FamilyDraws(run, settings, manifest, step).drawn


def containment(manifest: Mapping[str, Any]) -> Contains:
    """Return which members of a run are parts of which."""

    @lru_cache(None)
    def known() -> dict[str, Member]:
        return {member.name: member for member in members_of(manifest)}

    @lru_cache(None)
    def contains(large: str | None, small: str | None) -> bool:
        if large is None or small is None:
            return large is None
        whole = ModelConfig(**manifest["model"])
        return large in known() and lies_in(whole, known()[small], known()[large])

    return contains


def trained_sequences(
    audit: Compliance, run: RunDir, settings: RunSettings, manifest: Mapping[str, Any]
) -> dict[str, Any]:
    """Return on how many sequences each member trained in the lineage, as the ledger says, and the
    operations of all passes by member, of the draws that the audit held against the ledger; of each
    stage of a family that grows the sequences and operations of all. {} for a run of one model.

    A pass without gradient costs a third; skipped blocks cost nothing, exits another head each.
    """
    if not manifest.get("members"):
        return {}
    draws, steps = FamilyDraws(run, settings, manifest, audit.step), settings.batch_steps
    whole, length = ModelConfig(**manifest["model"]), settings.data.sequence_length
    flops: dict[str, float] = {}
    stages: dict[str, dict[str, float]] = {}
    for step in range(audit.step):
        found = draws.choices(step) or [(Term(None),)]
        stage = stages.setdefault(draws.stage(step), {"sequences": 0, "flops": 0.0})
        stage["sequences"] += steps.sequences(step)
        for choice in found:
            for term in passes_of(choice):
                name = name_of(term.member) or WHOLE
                spent = term_flops(term, whole, length) * length
                spent *= steps.sequences(step) / len(found)
                flops[name] = flops.get(name, 0.0) + spent
                stage["flops"] += spent
    trained = {name or WHOLE: count for name, count in audit.trained.sequences.items()}
    facts = {"sequences": audit.trained.slots, "trained_sequences": trained, "flops": flops}
    return facts | ({"stages": stages} if manifest.get("stages") else {})


def add_doses(
    rows: Sequence[dict[str, Any]],
    questions: Sequence[Question],
    plan: ExposurePlan,
    audit: Compliance,
    manifest: Mapping[str, Any],
) -> None:
    """Add to each experiment's row of `compliance` what dose each member had, by arm (`doses`);
    nothing for a run of one model.

    An experiment that never shows its units' texts (A/A) is counted by its placebos. Members that
    grow share no weights; what each consumed stands in the rows of its arms.
    """
    members = [None, *(member["name"] for member in manifest.get("members") or [])]
    if len(members) < 2 or manifest.get("stages"):
        return
    exposures, contains = plan.exposures(), containment(manifest)
    placebo = (exposures.flags & PLACEBO_FLAG) > 0
    for row, question in zip(rows, questions, strict=True):
        number = plan.experiments.index(question.name)
        wanted = placebo != question.experiment.inserts_units
        mine = (exposures.experiment == number) & wanted & (audit.choice >= 0)
        arms = question.spec.arms
        row["doses"] = doses(
            question.arms[exposures.unit[mine]],
            audit.choice[mine],
            np.bincount(question.arms, minlength=len(arms)).tolist(),
            [arm.name for arm in arms],
            audit.trained,
            members,
            contains,
        )
