"""After training (or a part of it): the audit of a run, its measured experiments, and whether its
definition is the frozen one.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.experiments.analysis.measured import Measured, held_out_units, measure
from motet.experiments.analysis.power import Assumed
from motet.experiments.analysis.scores import Probed, read_probes
from motet.experiments.design.assignment import Question
from motet.experiments.design.frozen import (
    check_kinds,
    read_definition,
    read_questions,
)
from motet.experiments.design.known_overlaps import known_overlaps
from motet.experiments.design.overlap import Overlap
from motet.experiments.library.kinds import Library
from motet.experiments.stream.audit import Compliance, audit_lines, check_ledger
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.ledger import Stretch, lineage
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.kept_models import stage_with, stages_of
from motet.launcher.runs.manifest import open_stream
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_checkpoint
from motet.launcher.runs.verify import AUDITED, inspect
from motet.launcher.study import cautions
from motet.launcher.study.before_training import assumed_of
from motet.launcher.study.deviations import altered, changed_settings, other_judging
from motet.launcher.study.endpoint import Ends, Standing, changed_training, standing
from motet.launcher.study.preregistration import preregistered
from motet.launcher.study.who_trained import add_doses, drawn_again, trained_sequences
from motet.models.family.base import WHOLE


@dataclass(frozen=True)
class AuditResult:
    """Whether the ledger proves the plan, and the proof in words."""

    ok: bool
    lines: list[str]


@dataclass(frozen=True)
class StudyResult:
    """Everything that the report is made of, beside metrics and manifest.

    Attributes:
        measured: one per experiment that was probed.
        definition: the frozen definition.
        deviations: how the present definition differs from the frozen one, in words; empty when it
            does not.
        seed, draws: of the analysis.
        assumed: what the smallest detectable effects before training were computed with.
        compliance: the audit as JSON (`compliance` of report.json).
        unanswered: experiments that have no answer although they were asked, and why, in words.
        standing: what the verdicts are worth now.
        later: the experiments as the newest weights show them, where these are others than those
            that are judged.
        definition_sha256: of the definition that the run was frozen with.
    """

    measured: list[Measured]
    definition: dict[str, Any]
    deviations: list[str]
    seed: int
    draws: int
    compliance: dict[str, Any]
    unanswered: list[str] = field(default_factory=list)
    standing: Standing = field(default_factory=lambda: Standing("judged", 0, {}))
    later: list[Measured] = field(default_factory=list)
    definition_sha256: str = ""
    assumed: Assumed = field(default_factory=Assumed)

    @property
    def n_questions(self) -> int:
        """How many questions the run was frozen with, controls not counted; a declared slope over
        sizes is one more.
        """
        specs = [entry["spec"] for entry in self.definition["experiments"]]
        asked = [spec for spec in specs if spec.get("role", "question") == "question"]
        return sum(1 + bool(spec.get("size_slope")) for spec in asked)


def newest_checkpoint(run: RunDir) -> tuple[int, int]:
    """Return (step, segment) of the newest checkpoint: the weights that a report speaks of.

    Raises:
        UserError: there is none yet.
    """
    steps = run.checkpoint_steps()
    if not steps:
        raise UserError(f"{run.root} has no checkpoint yet; there is nothing to report on or audit")
    manifest = read_checkpoint(run, steps[-1])
    return int(manifest["step"]), int(manifest["segment"])


def audit(run: RunDir, settings: RunSettings, plan: ExposurePlan, replay: bool) -> Compliance:
    """Audit the newest checkpoint, who trained included; `replay` recomputes what was consumed
    from corpora and plan.
    """
    step, segment = newest_checkpoint(run)
    stream = open_stream(settings, plan) if replay else None
    return check_ledger(
        run.ledger,
        plan,
        settings.batch_steps,
        segment,
        step,
        None if stream is None else lambda first, count: stream.batch(first, count).digest(),
        drawn_again(run, settings, read_json(run.manifest), step),
    )


def audit_run(root: Path, replay: bool = False) -> AuditResult:
    """Prove from the ledger that every planned exposure was consumed exactly once in the lineage of
    the final weights.
    """
    run = RunDir.open(root)
    found = inspect(run, AUDITED)
    if spoils := found.spoils:
        return AuditResult(False, [*(f"PROBLEM: {one}" for one in spoils), "AUDIT FAILED"])
    settings = run_yaml.load(run.resolved_yaml)
    plan = ExposurePlan(run.plan / "exposures.plan")
    check_kinds(run.plan, Library(run.plugins))
    compliance = audit(run, settings, plan, replay)
    beside = [f"damaged, and no part of this proof: {one}" for one in found.damage]
    return AuditResult(compliance.ok, [*beside, *audit_lines(compliance)])


def load_measured(root: Path, damaged: Sequence[str] = ()) -> StudyResult:
    """Read everything that the report of a run needs.

    Args:
        damaged: what is known to be damaged, in words: no verdict is given on it.
    """
    run = RunDir.open(root)
    settings = run_yaml.load(run.resolved_yaml)
    manifest = read_json(run.manifest)
    definition, sha256 = read_definition(run.plan)
    plan = ExposurePlan(run.plan / "exposures.plan")
    questions = read_questions(run.plan, Library(run.plugins))
    spoiled = altered(run, sha256)
    spoiled += other_judging(run, definition, questions)
    if plan.sha256 != manifest["plan_sha256"]:
        spoiled.append("the plan file is not the one that was frozen")
    compliance = audit(run, settings, plan, replay=False)
    step, segment = newest_checkpoint(run)
    newest = lineage(run.ledger, segment, step)
    members = members_of(manifest)
    sizes = sizes_of(manifest, definition)
    stages = stages_of(run, manifest)
    reader = _Reader(run, settings, plan, questions, members, definition, sizes, stages)
    ends, later = Ends.of(run, definition), []
    if ends.reached:
        moved, measured = reader.judged(ends, manifest, (step, segment, compliance))
        spoiled += moved
    else:
        measured = reader.measured(newest, compliance)
    where = standing(ends, step, newest, [*damaged, *spoiled], settings.steps)
    if where.beyond:
        later = [
            one
            for one in reader.measured(newest, compliance)
            if where.taken_back or one.steps[-1] > ends.judged_at[one.name]
        ]
    return StudyResult(
        measured=measured,
        definition=definition,
        deviations=[*spoiled, *changed_settings(run, settings, definition)],
        seed=int(definition["seed"]),
        draws=int(definition["analysis"]["draws"]),
        compliance={
            **compliance_json(compliance, plan, questions, manifest),
            **trained_sequences(compliance, run, settings, manifest),
            **told_by_others(measured),
            **preregistered(run, definition),
            **({"warnings": warned} if (warned := cautions.kept(run.plan)) else {}),
        },
        unanswered=unanswered(questions, measured),
        standing=where,
        later=later,
        definition_sha256=manifest["definition_sha256"],
        assumed=assumed_of(settings),
    )


@dataclass(frozen=True)
class _Reader:
    """Reads a run's probes of any lineage."""

    run: RunDir
    settings: RunSettings
    plan: ExposurePlan
    questions: Sequence[Question]
    members: Sequence[str | None]
    definition: Mapping[str, Any]
    sizes: Mapping[str, int | None]
    """Parameters by member, the whole model as "whole"."""
    stages: Sequence[Mapping[str, Any]] = ()
    """Of members that grow, in order (`stages` of the manifest)."""

    def measured(
        self, stretches: Sequence[Stretch], compliance: Compliance, until: int | None = None
    ) -> list[Measured]:
        """Every experiment that was probed in a lineage; `until`: those whose last probe is there,
        on each member.
        """
        found: list[Measured] = []
        batches, total = self.settings.batch_steps, int(self.definition["steps_total"])
        for member in self.members:
            probed = self.probed(stretches, member)
            if until is not None:
                last = min(until, self.end_of(member))
                probed = {
                    name: one
                    for name, found_there in probed.items()
                    if (one := self.frozen(name, found_there, last)).steps[-1:] == [last]
                }
            found += measure(
                self.questions,
                probed,
                self.plan,
                batches,
                compliance,
                member,
                total,
                self.overlaps,
                self.sizes.get(member or WHOLE),
            )
        return found

    def probed(self, stretches: Sequence[Stretch], member: str | None) -> dict[str, Probed]:
        """The probes of a member by experiment; of one that grew, those of the models that it, or
        what it is a slice of, was made of as well, each as long as it trained. Without its own it
        was not measured.
        """
        own = read_probes(self.run.probes, stretches, member)
        names = [entry["name"] for entry in self.stages]
        own_stage = stage_with(self.stages, member or WHOLE) if names else WHOLE
        before = names[: names.index(own_stage)] if names else []
        found: dict[str, Probed] = {}
        for part in (*(read_probes(self.run.probes, stretches, name) for name in before), own):
            for name in own.keys() & part.keys():
                entry = found.setdefault(name, Probed([], []))
                entry.steps.extend(part[name].steps)
                entry.scores.extend(part[name].scores)
        return found

    def end_of(self, member: str | None) -> float:
        """The step at which a member, or what it is a slice of, grew: it is judged as then."""
        pairs = itertools.pairwise(self.stages)
        ends = {one["name"]: int(after["start_step"]) for one, after in pairs}
        own = stage_with(self.stages, member or WHOLE) if self.stages else WHOLE
        return ends.get(own, math.inf)  # the last stage, and its slices, have none

    @cached_property
    def overlaps(self) -> list[Overlap]:
        """Experiments that tell of each other's units, whatever was trained or probed."""
        return known_overlaps(self.questions)

    def frozen(self, name: str, probed: Probed, until: float) -> Probed:
        """The probes of an experiment that its definition asks for, up to a step: what a hook
        measures beside them decides nothing.
        """
        entries = self.definition["experiments"]
        asked = next(set(e["probe_steps"]) for e in entries if e["spec"]["name"] == name) | {until}
        kept = [
            (step, scores)
            for step, scores in zip(probed.steps, probed.scores, strict=True)
            if step in asked
        ]
        return Probed([step for step, _ in kept], [scores for _, scores in kept])

    def judged(
        self, ends: Ends, manifest: Mapping[str, Any], newest: tuple[int, int, Compliance]
    ) -> tuple[list[str], list[Measured]]:
        """(what spoils the judgement, each experiment up to its step of judgement), from the
        lineage that was the first to be measured there.
        """
        spoiled: list[str] = []
        found: list[Measured] = []
        total = int(self.definition["steps_total"])
        for step, segment in sorted(ends.segments.items()):
            assert segment is not None
            stretches = lineage(self.run.ledger, segment, step)
            compliance = newest[2]
            if (step, segment) != newest[:2]:
                batches = self.settings.batch_steps
                compliance = check_ledger(self.run.ledger, self.plan, batches, segment, step)
            spoiled += changed_training(self.run, manifest, stretches, total)
            due = {name for name, judged in ends.judged_at.items() if judged == step}
            there = self.measured(stretches, compliance, until=step)
            found += [one for one in there if one.name in due]
        order = {question.name: number for number, question in enumerate(self.questions)}
        members = {member: number for number, member in enumerate(self.members)}
        found.sort(key=lambda one: (members[one.member], order[one.name]))
        return list(dict.fromkeys(spoiled)), found


def members_of(manifest: Mapping[str, Any]) -> list[str | None]:
    """The members of a run: the whole model (None), then those that the manifest names."""
    return [None, *(member["name"] for member in manifest.get("members") or [])]


def sizes_of(
    manifest: Mapping[str, Any], definition: Mapping[str, Any]
) -> Mapping[str, int | None]:
    """Parameters by member, as the definition was frozen with; the manifest's where it is older."""
    known = {member["name"]: member.get("parameters") for member in manifest.get("members") or []}
    found: Mapping[str, int | None] = definition.get("members") or {
        WHOLE: manifest.get("parameters"),
        **known,
    }
    return found


def unanswered(questions: Sequence[Question], measured: Sequence[Measured]) -> list[str]:
    """Say which experiments have scores, but none of the member that their answer is for."""
    found = []
    for question in questions:
        probed = [one.member for one in measured if one.name == question.name]
        if probed and question.spec.member not in probed:
            where = "the whole model" if question.spec.member is None else question.spec.member
            found.append(
                f"{question.name} is to be answered at {where}, which no probe has measured"
            )
    return found


def told_by_others(measured: Sequence[Measured]) -> dict[str, Any]:
    """Return which experiments showed which others' held-out units (`told_by_others` of
    compliance); empty when none did.
    """
    by_name = {m.name: m for m in measured}  # members saw the same exposures
    rows = [
        {
            "name": m.name,
            "by": other.name,
            "declared": other.declared,
            "units": int((other.shown > 0).sum()),
            "held_out_units": int((held_out_units(m) & (other.shown > 0)).sum()),
            "held_out": int(held_out_units(m).sum()),
            "held_out_exposures": int(other.shown[held_out_units(m)].sum()),
        }
        for m in by_name.values()
        for other in m.by_others
    ]
    return {"told_by_others": rows} if rows else {}


def compliance_json(
    audit: Compliance,
    plan: ExposurePlan,
    questions: Sequence[Question],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the audit as the `compliance` part of report.json."""
    rows = plan.exposures()
    placebo = (rows.flags & PLACEBO_FLAG) > 0
    per_experiment = []
    for question in questions:
        mine = (rows.experiment == plan.experiments.index(question.name)) & audit.due
        per_experiment.append(
            {
                "name": question.name,
                "planned": int((mine & ~placebo).sum()),
                "planned_placebo": int((mine & placebo).sum()),
                "consumed_once": int((mine & ~placebo & (audit.consumed == 1)).sum()),
                "consumed_once_placebo": int((mine & placebo & (audit.consumed == 1)).sum()),
                "missing": int((mine & (audit.consumed == 0)).sum()),
                "duplicated": int((mine & (audit.consumed > 1)).sum()),
                "not_applied": int((mine & (audit.consumed > 0) & (audit.applied == 0)).sum()),
            }
        )
    add_doses(per_experiment, questions, plan, audit, manifest)
    return {
        "planned": audit.planned,
        "consumed_once": audit.consumed_once,
        "missing": audit.missing,
        "duplicated": audit.duplicated,
        "skipped_updates": len(audit.skipped_steps),
        "per_experiment": per_experiment,
        "ledger_ok": audit.ok,
        "problems": list(audit.problems),
    }
