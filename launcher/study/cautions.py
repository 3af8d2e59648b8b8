"""What makes an answer weaker and is no mistake: said by `check` and when a run is made, and kept
for its report.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from motet.core.errors import Problem
from motet.core.files import read_json, write_json
from motet.experiments.design.in_corpus import Found, hits_of
from motet.experiments.design.overlap import Overlap, find_leaks
from motet.experiments.design.shares import IN_WORDS, shared_words
from motet.experiments.design.study import Study
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.manifest import repeat_of, training_sources
from motet.launcher.study.answerable import answer_warnings
from motet.launcher.study.before_training import assumed_of
from motet.launcher.study.contamination import searched
from motet.launcher.study.controls import window_warnings

KEPT = "warnings.json"


def study_warnings(study: Study, settings: RunSettings) -> list[Problem]:
    """Return the warnings of a study: questions that hardly any effect could answer, few held-out
    clusters, units that a dose does not reach in time, or that its own texts or the base corpora
    tell of, and a positive control that is judged too soon.

    Args:
        study: of the run.
        settings: its settings; `experiments.scan_tokens` says how much is searched.
    """
    leaks = [_leak(study, leak) for leak in find_leaks(study.questions)]
    told = _corpus_warnings(study, settings)
    weak = answer_warnings(study, assumed_of(settings))
    return [*weak, *_unshown(study), *leaks, *told, *window_warnings(study), *_repeated(settings)]


def _repeated(settings: RunSettings) -> Iterator[Problem]:
    """That what is read again and again is a property of the whole run."""
    asked = settings.data.repeat
    repeat = repeat_of(settings)
    if repeat is not None:
        slots = settings.slots_before(settings.steps)
        message = (
            f"is a global treatment: {asked.share:.2%} of the sequences are {asked.sequences:,} of "
            f"them, each read about {repeat.times(slots):.3g} times. Every question of this run is "
            "asked under it, and nothing inside the run can say what it does: one arm a run, no "
            "p-value; compare with runs of another share"
        )
        yield Problem("data.repeat", message)


def _unshown(study: Study) -> list[Problem]:
    """Units of arms with a dose that are not shown before their question is judged, because the
    dose is a total that does not reach all of them, or the judgement comes early. They count as
    shown, and the contrast is smaller than the effect.
    """
    rows, setting = study.plan.rows, study.setting
    found = []
    for number, question in enumerate(study.questions):
        if not question.experiment.inserts_units:
            continue
        judged = question.spec.judged_step(setting.steps_total)
        mine = (rows.experiment == number) & (rows.flags & PLACEBO_FLAG == 0)
        early = mine & (setting.steps.step_of(rows.slot) < judged)
        treated, shown = question.treated(), np.zeros(len(question.units), dtype=bool)
        shown[rows.unit[early]] = True
        if lacking := int((treated & ~shown).sum()):
            ever = len(np.unique(rows.unit[mine])) == int(treated.sum())
            name = "judge_at" if ever else "doses"
            message = (
                f"leaves {lacking} of the {int(treated.sum())} units of arms with a dose without "
                f"any exposure before step {judged:,}, where it is judged: they count as shown, "
                "which makes the contrast smaller than the effect; "
                + ("judge later" if ever else "give more, or take fewer units")
            )
            found.append(Problem(f"experiments.{question.name}.{name}", message))
    return found


def _leak(study: Study, leak: Overlap) -> Problem:
    """Units whose probes a text of another cluster of the same experiment holds."""
    question = next(each for each in study.questions if each.name == leak.told)
    one = leak.links[0]
    unit, other = question.units[one.unit], question.units[one.teller]
    words = " ".join(shared_words(question, question, one))
    message = (
        f"{len(leak.units)} of {len(question.units)} units are told of by texts of other units "
        f"that may be in another arm (the text of {other.id!r} holds of {unit.id!r} "
        f"{IN_WORDS[one.how]}: {words!r}); give such units one value of an attribute and "
        "cluster_by it, or the contrast is smaller than the effect"
    )
    return Problem(f"experiments.{leak.told}.cluster_by", message)


def _corpus_warnings(study: Study, settings: RunSettings) -> list[Problem]:
    """Units that the corpora hold, or what was done about them."""
    # Whatever is removed from the corpora is in them on purpose.
    questions = [one for one in study.questions if not one.experiment.removes]
    asked = {question.name: question.units for question in questions}
    most = settings.experiments.scan_tokens
    found: Sequence[Found] | None = study.decision.found
    if not found:
        found = searched(settings, asked, study.setting.tokenizer, most)
    if found is None:
        total = sum(corpus.n_tokens for corpus in training_sources(settings))
        message = (
            f"is {most:,} and the corpora have {total:,} tokens, so they were not searched for "
            f"units; experiments.scan_tokens={total} searches them"
        )
        return [Problem("experiments.scan_tokens", message)] if most else []
    if study.decision.policy == "replace":
        return list(_replaced(study))
    by_name = {one.name: one for one in found}
    told = []
    for question in questions:
        if left := study.decision.excluded.get(question.name):
            before = len(left) + len(question.units)
            message = (
                f"{len(left)} of {before} units left the study before any was assigned, because "
                "the base text holds them or one of their cluster "
                "(experiments.decontaminate.policy=exclude)"
            )
            told.append(Problem(f"experiments.{question.name}", message))
        hits = hits_of(by_name[question.name], question)
        told += [Problem(f"experiments.{hits.name}", str(hits))] if hits.units else []
    return told


def _replaced(study: Study) -> Iterator[Problem]:
    if study.fixed is not None:
        rows = study.fixed.request
        tokens = int(rows.texts.lengths().sum())
        message = (
            f"replaces base text that holds units: {len(rows.unit_keys):,} places, {len(rows):,} "
            f"times = {tokens:,} tokens of this run; a run that is made longer reads them as they "
            "are after its old end"
        )
        yield Problem("experiments.decontaminate.policy", message)


def keep(warnings: Sequence[Problem], plan: Path) -> None:
    """Write the warnings beside the frozen study; nothing when there are none."""
    if warnings:
        write_json(plan / KEPT, [str(warning) for warning in warnings])


def kept(plan: Path) -> list[str]:
    """The warnings that a run was made with, [] for one without or of before there were any.

    Raises:
        UserError: the file is damaged.
    """
    path = plan / KEPT
    return [str(line) for line in read_json(path)] if path.exists() else []
