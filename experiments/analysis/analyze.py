"""From measured experiments to answers: every outcome estimated, corrected, judged, and told in a
sentence.

`analyze` makes the `answers` part of report.json; docs/statistics.md says what the numbers mean.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from motet.core.plugins import PluginError
from motet.experiments.analysis.answers import Answer
from motet.experiments.analysis.by_size import size_slope
from motet.experiments.analysis.controls import controls_of, unsound_at
from motet.experiments.analysis.declared import primary_of
from motet.experiments.analysis.measured import Measured, noncompliance
from motet.experiments.analysis.members import (
    ByMember,
    by_experiment,
    name_of_member,
    of_member,
    secondaries,
)
from motet.experiments.analysis.negative import fault
from motet.experiments.analysis.order import order_note, order_test
from motet.experiments.analysis.power import Assumed
from motet.experiments.analysis.separation import separation_notes, separations
from motet.experiments.analysis.two_by_two import add_interactions
from motet.experiments.analysis.verdict import estimate_text, judge
from motet.experiments.analysis.whole_run import whole_run
from motet.experiments.design.spec import ALPHA, n_tests


def analyze(
    measured: Sequence[Measured],
    seed: int,
    draws: int = 10_000,
    details: bool = True,
    n_questions: int | None = None,
    assumed: Assumed | None = None,
    simulations: int | None = None,
) -> dict[str, Any]:
    """Return the `answers` part of report.json.

    An experiment that was measured on several members is answered at the one that its definition
    names; what the other members show is secondary. With one member nothing is said of members.

    Args:
        measured: experiments after training, one per experiment and member.
        seed: keys the repeated assignments (never the actual one).
        draws: repetitions per comparison; the smallest p-value is 1 / (draws + 1).
        details: False leaves out effects per arm and curves.
        n_questions: how many questions the run was frozen with, a declared slope over sizes
            counted as one more; None: as many as were measured. Those without an answer count as
            p = 1 in Holm's correction, whatever the reason.
        assumed: what smallest detectable effects before training were computed with.
        simulations: studies that each smallest detectable effect is simulated with; 0 = none is;
            None = enough of them, unless the user's cache has the figures.
    """
    alpha = one_alpha(measured)
    of_run = [m for m in measured if m.experiment.treatment == "global"]
    measured = [m for m in measured if m.experiment.treatment != "global"]
    asked = {m.name: m.experiment.spec for m in measured if m.experiment.role == "question"}
    over = max(n_tests(asked.values()), n_questions or 0)
    studies, entries, failed = _estimated(
        by_experiment(measured), seed, draws, details, alpha, max(1, over), simulations
    )
    for study, entry in zip(studies, entries, strict=True):
        entry["power"] = study.power(assumed or Assumed())
    questions = [e for e in entries if e["role"] == "question"]
    _correct_primaries(questions, over)
    add_interactions(studies, entries)
    _correct_secondaries(questions)
    smallest = {s.spec.name: s.smallest_p() for s in studies if s.spec.role == "placebo"}
    controls = controls_of(entries, smallest, alpha)
    unmeasured = [
        f"The control {one['name']} could not be measured." for one in failed if one["control"]
    ]
    for study, entry in zip(studies, entries, strict=True):
        for other in entry.get("members") or []:
            other["invalid"] = _invalid(study, other, other["member"], controls, unmeasured)
        invalid = _invalid(study, entry, study.member, controls, unmeasured)
        entry["verdict"] = _verdict(study, entry, invalid, over, alpha)
        if "size_slope" in entry:
            entry["size_slope"]["verdict"] = _slope_verdict(entry, invalid, over, alpha)
    for control in controls.values():
        if control is not None:
            control["verdict"] = next(e["verdict"] for e in entries if e["name"] == control["name"])
    answers: dict[str, Any] = {
        "alpha": alpha,
        "draws": draws,
        "experiments": questions,
        "controls": controls,
        "unanswered": failed,
        "multiplicity": {
            "primaries": "Holm",
            "secondaries": "Benjamini-Hochberg",
            "questions": over,
        },
    }
    if of_run:
        answers["whole_run"] = whole_run(of_run)
    return _finite(answers)


def one_alpha(measured: Sequence[Measured]) -> float:
    """The run's significance level; the smallest, in run folders whose experiments were frozen
    with levels of their own.
    """
    return min((one.experiment.spec.alpha for one in measured), default=ALPHA)


def _estimated(
    experiments: Sequence[ByMember],
    seed: int,
    draws: int,
    details: bool,
    alpha: float,
    n_questions: int,
    simulations: int | None,
) -> tuple[list[Answer], list[dict[str, Any]], list[dict[str, Any]]]:
    """Each experiment at its own member, its entry of report.json with all members in it, and
    those that a mistake in the user's own class leaves without an answer: the others have theirs.
    """
    studies, entries, failed = [], [], []
    for one in experiments:
        try:
            study = Answer(one.judged, seed, draws, n_questions, alpha, None, simulations)
            entry = study.entry(details)
            if details and study.m.experiment.membership:
                entry["separation"] = separations(study)
                entry["notes"] += separation_notes(entry["separation"])
            if study.m.experiment.order and (order := order_test(study)):
                entry["order"] = order
                entry["notes"].append(order_note(order))
            if one.others:
                others = [
                    Answer(m, seed, draws, n_questions, alpha, study.repeater) for m in one.others
                ]
                entry |= {"member": study.member, "members": [other.further() for other in others]}
                declared = bool(study.spec.size_slope)
                level = study.detect_alpha if declared else alpha
                if slope := size_slope([study, *others], declared, level):
                    entry["size_slope"] = slope
        except PluginError as error:
            control = one.judged.experiment.role != "question"
            failed.append({"name": one.judged.name, "why": str(error), "control": control})
            continue
        studies.append(study)
        entries.append(entry)
    return studies, entries, failed


def _invalid(
    study: Answer,
    at: Mapping[str, Any],
    member: str | None,
    controls: Mapping[str, dict[str, Any] | None],
    unmeasured: Sequence[str],
) -> str:
    """Why what an experiment says at a member cannot be relied on, or ""; failed controls void
    questions only.
    """
    question = study.m.experiment.role == "question"
    unsound = [*unsound_at(controls, member), *unmeasured] if question else []
    found = (*unsound, noncompliance(study.m), fault(at))
    return " ".join(reason for reason in found if reason)


def _verdict(
    study: Answer, entry: dict[str, Any], invalid: str, n_questions: int, alpha: float
) -> dict[str, str]:
    """The verdict on one corrected primary outcome."""
    where = of_member(study.member) if "members" in entry else ""
    over = n_questions if entry["role"] == "question" else 1
    main = entry["primary"]
    room = primary_of(study.m.experiment).room(main["control_mean"])
    return judge(main, alpha, study.spec.margin, invalid, over, where, room)


def _slope_verdict(
    entry: dict[str, Any], invalid: str, n_questions: int, alpha: float
) -> dict[str, str]:
    """The verdict on the slope over sizes: it is made of all members, so a failure at one of them
    takes it with it. One that was not declared has none.

    Args:
        invalid: of the member that is judged.
    """
    slope = entry["size_slope"]
    faults = [(entry["member"], invalid)]
    faults += [(other["member"], other["invalid"]) for other in entry["members"]]
    why = " ".join(f"At {name_of_member(member)}: {reason}" for member, reason in faults if reason)
    if slope["declared"]:
        return judge(slope, alpha, None, why, n_questions)
    told = f"Exploratory, it was not declared: {estimate_text(slope, 1, '')}."
    return {
        "kind": "exploratory",
        "sentence": f"{told} Not to be relied on. {why}" if why else told,
    }


def _correct_primaries(entries: Sequence[dict[str, Any]], over: int = 0) -> None:
    """Holm over the primary outcomes of the questions, each at the member that its answer is for,
    and their declared slopes over sizes; one without an estimate counts as p = 1, and so does every
    question of `over` without an answer.
    """
    from statsmodels.stats.multitest import multipletests

    outcomes = [entry["primary"] for entry in entries]
    slopes = [entry["size_slope"] for entry in entries if "size_slope" in entry]
    outcomes += [slope for slope in slopes if slope["declared"]]
    if outcomes:
        raw = [1.0 if outcome["p"] is None else outcome["p"] for outcome in outcomes]
        raw += [1.0] * (over - len(outcomes))
        corrected = multipletests(raw, method="holm")[1][: len(outcomes)]
        for outcome, p in zip(outcomes, corrected, strict=True):
            outcome["p_corrected"] = None if outcome["p"] is None else float(p)


def _correct_secondaries(entries: Sequence[dict[str, Any]]) -> None:
    """Benjamini-Hochberg over all outcomes of the questions that are not primary and have an
    estimate: secondary ones, and every outcome of a member that the answer is not for.
    """
    from statsmodels.stats.multitest import multipletests

    outcomes = [o for entry in entries for o in secondaries(entry) if o["p"] is not None]
    if outcomes:
        corrected = multipletests([outcome["p"] for outcome in outcomes], method="fdr_bh")[1]
        for outcome, p in zip(outcomes, corrected, strict=True):
            outcome["p_corrected"] = float(p)


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
