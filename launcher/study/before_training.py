"""Before step 1: from a run's settings to its study. Check, power, preview, build, freeze."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import Problem, UserError, problems_in, raise_problems
from motet.experiments.analysis.power import Assumed
from motet.experiments.corpora.inspection import load_tokenizer
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import ask
from motet.experiments.design.declared import cluster_problems, member_problems
from motet.experiments.design.experiment import item_problems, make
from motet.experiments.design.frozen import Hashes, check_kinds, freeze
from motet.experiments.design.imported import shown_problems
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.requests import Setting
from motet.experiments.design.room import room_problem
from motet.experiments.design.spec import ExperimentSpec, n_tests
from motet.experiments.design.study import (
    Draft,
    Study,
    draft_study,
    place_study,
    with_controls,
)
from motet.experiments.design.treatments import GLOBAL_ROLE, treatment_problems
from motet.experiments.design.trial import trial_problems
from motet.experiments.library.kinds import Library
from motet.experiments.scoring.probes import encode_items, surely_fit
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.described_model import model_of
from motet.launcher.runs.families import new_members
from motet.launcher.runs.manifest import data_facts, open_corpora, open_stream
from motet.launcher.runs.rundir import RunDir
from motet.launcher.study.answerable import answer_problems
from motet.launcher.study.contamination import decided
from motet.launcher.study.controls import control_problems
from motet.launcher.study.embedding_noise import noise_problems
from motet.models import counts
from motet.models.family.base import WHOLE

CONTEXT_TOKENS = 24


def specs_of(settings: RunSettings, library: Library) -> tuple[list[ExperimentSpec], list[Problem]]:
    """Return the experiments of a run, controls included, and every problem of their
    definitions.
    """
    entries = list(settings.experiments.list)
    if settings.experiments.controls:
        entries = with_controls(entries)
    timed = [_timed(entry, settings, library) for entry in entries]
    return parse_experiments(timed, Path(settings.base), library, settings.experiments.alpha)


def _timed(entry: Mapping[str, Any], settings: RunSettings, library: Library) -> Mapping[str, Any]:
    """Return an entry probed at `probes.every`, unless it or its class asks for particular
    steps; answered at `experiments.member`, unless it says where.
    """
    if not isinstance(entry, Mapping):
        return entry
    if settings.experiments.member is not None:
        entry = {"member": settings.experiments.member, **entry}
    if "probe_at" in entry:
        return entry
    try:
        kind = library.kind(str(entry.get("use")), "use")
    except UserError:
        return entry  # parsing tells
    asked = kind.defaults.get("probe_at", {})
    if not isinstance(asked, Mapping) or set(asked) - {"every"}:
        return entry  # parsing tells
    return {**entry, "probe_at": {"every": settings.probes.every}}


def library_of(settings: RunSettings) -> Library:
    """Return the classes that a run.yaml may name: built in, or in files next to it."""
    return Library(Path(settings.base))


def tokenizer_of(settings: RunSettings) -> Tokenizer:
    """Return the tokenizer that the first corpus was made with; it ends documents as that does.

    Raises:
        UserError: the corpus has none (token files of others may lack it).
    """
    corpus = open_corpora(settings)[0]
    tokenizer = load_tokenizer(corpus)
    if tokenizer is None:
        raise UserError(
            f"data.corpora[0].path={corpus.path}: it has no tokenizer, so experiments cannot be "
            "written into it; "
            "index its token files again with a tokenizer"
        )
    return tokenizer


def setting_of(settings: RunSettings) -> Setting:
    """Return where the study takes place."""
    return Setting(
        seed=settings.plan_seed,
        steps=settings.batch_steps,
        steps_total=settings.steps,
        tokenizer=tokenizer_of(settings),
        stream=open_stream(settings),
        draws=settings.experiments.draws,
        alpha=settings.experiments.alpha,
        facts=data_facts(settings),
        kinds=library_of(settings),
        sizes=sizes_of(settings),
        insertions=Path(file) if (file := settings.experiments.insertions) else None,
    )


def sizes_of(settings: RunSettings) -> dict[str, int]:
    """Return the parameters of every member of a run's family, the whole model as "whole"; {} for a
    run of one model.

    Raises:
        UserError: the family or its members cannot be.
    """
    if settings.family.kind == WHOLE:
        return {}
    whole, _ = model_of(settings)
    members = new_members(settings, whole).get("members") or []
    found = {WHOLE: counts.parameters(whole)}
    return found | {member["name"]: member["parameters"] for member in members}


def assumed_of(settings: RunSettings) -> Assumed:
    """Return what the simulation of power takes for granted."""
    return Assumed(**asdict(settings.experiments.assume))


def build(settings: RunSettings, must_answer: bool = False) -> Study:
    """Return the compiled study of a run.

    Args:
        settings: of the run.
        must_answer: refuse questions that no outcome could answer, as a new run is to be.

    Raises:
        UserError: every problem of definitions, items, schedules, probes, controls and room.
    """
    problems, study = checked(settings, must_answer)
    raise_problems(problems)
    assert study is not None
    return study


def check(settings: RunSettings) -> list[Problem]:
    """Return every problem of the experiments of a run: definitions, items, room in the stream,
    probes.
    """
    return checked(settings)[0]


def checked(settings: RunSettings, must_answer: bool = True) -> tuple[list[Problem], Study | None]:
    """Return every problem of the experiments of a run, and its study when there is none.

    No problem hides another: experiments that are sound by themselves are held against each other
    and against the corpus whatever is wrong with the rest.
    """
    library = library_of(settings)
    specs, problems = specs_of(settings, library)
    wrong = [problem.setting for problem in problems]
    unsound = {spec.name for spec in specs if any(_is_of(spec.name, one) for one in wrong)}
    sound = [spec for spec in specs if spec.name not in unsound]
    study = None
    try:
        lock = Path(settings.experiments.lock) if settings.experiments.lock else None
        setting = setting_of(settings)
        decision = decided(settings, sound, library, setting.tokenizer)
        draft = draft_study(sound, setting, lock, decision)
        problems += draft.problems
        problems += _design_problems(draft, settings, must_answer)
    except UserError as error:
        unsound = {spec.name for spec in specs}
        problems += problems_in(error, "experiments")
    else:
        study = _placed(draft, problems)
    for spec in specs:
        problems += item_problems(spec, library) if spec.name in unsound else []
    return list(dict.fromkeys(problems)), None if problems else study


def _placed(draft: Draft, problems: list[Problem]) -> Study | None:
    """Return a draft's study; where there is no room for it, that becomes a problem."""
    try:
        return place_study(draft) if draft.placeable else None
    except UserError as error:
        problems += problems_in(error, "experiments")
        return None


def _is_of(name: str, setting: str) -> bool:
    """Whether a setting is one of an experiment's."""
    return f"{setting}.".startswith(f"experiments.{name}.")


def _design_problems(draft: Draft, settings: RunSettings, must_answer: bool) -> list[Problem]:
    """Return what is wrong with the questions of a draft as designs, and with their probes."""
    found = [one for question in draft.questions for one in cluster_problems(question)]
    found += answer_problems(draft, assumed_of(settings)) if must_answer else []
    found += member_problems(draft.questions, draft.setting.sizes)
    found += treatment_problems(draft.questions)
    if draft.setting.insertions is not None:
        found += shown_problems(draft.setting.insertions, draft.questions)
    found += noise_problems(draft.questions, settings)
    return [*_probe_problems(draft), *control_problems(draft), *found]


def check_classes(run: RunDir) -> None:
    """Refuse to go on with a run whose users' own classes are missing or changed, before anything
    starts.
    """
    check_kinds(run.plan, Library(run.plugins))


def freeze_study(study: Study, library: Library, run: RunDir) -> Hashes:
    """Write a study to the run folder, with the sources of users' own classes, and return its
    hashes.

    The classes are loaded once more, from where the run will load them ever after: one that works
    only next to run.yaml is found before the run begins.

    Raises:
        UserError: a source was changed since the study was built, or does not load there.
    """
    for question in study.questions:
        library.keep(question.spec.use, run.plugins)
    hashes = freeze(study, run.plan)
    for question in study.questions:
        make(question.spec, Library(run.plugins))
    return hashes


def _probe_problems(study: Draft) -> list[Problem]:
    """Return the probes that are longer than a sequence."""
    problems = []
    for question in study.questions:
        items = [item for unit in question.units for item in unit.items]
        where = f"experiments.{question.name}"
        if surely_fit(items, study.setting.tokenizer, study.setting.sequence_length):
            continue
        try:
            encode_items(items, study.setting.tokenizer, study.setting.sequence_length, where)
        except UserError as error:
            problems += problems_in(error, where)
    return problems


def power_table(settings: RunSettings) -> list[dict[str, Any]]:
    """Return the smallest detectable effect of each experiment, before any training; needs no
    corpus.

    What was simulated for the same assignment and assumptions is kept in the user's cache.
    """
    from motet.launcher.study.power_cache import power_of

    library = library_of(settings)
    specs, problems = specs_of(settings, library)
    raise_problems(problems)
    rows = []
    assumed = assumed_of(settings)
    n_questions = max(1, n_tests(specs))
    tokens = settings.batch_steps.slots_before(settings.steps) * settings.data.sequence_length
    asked = [room_problem(spec, library, None, tokens) for spec in specs]
    raise_problems([problem for problem in asked if problem is not None])
    for spec in (one for one in specs if one.role != GLOBAL_ROLE):
        question = ask(spec, settings.plan_seed, library)
        raise_problems(trial_problems(question, settings.steps))
        alpha = spec.alpha / n_questions if spec.role == "question" else spec.alpha
        found = power_of(question, settings.plan_seed, settings.experiments.draws, alpha, assumed)
        rows.append({"name": spec.name, "use": spec.use, "units": len(question.units), **found})
    return rows


def preview(settings: RunSettings, count: int) -> str:
    """Return up to `count` exposures of each experiment, decoded in their place in the stream."""
    study = build(settings)
    tokenizer, stream = study.setting.tokenizer, study.setting.stream
    rows, texts = study.plan.rows, study.plan.texts
    steps = study.setting.steps.step_of(rows.slot)
    lines: list[str] = []
    for number, question in enumerate(study.questions):
        mine = np.flatnonzero(rows.experiment == number)
        placebos = int(((rows.flags[mine] & PLACEBO_FLAG) > 0).sum())
        lines.append(f"{question.name}: {len(mine):,} exposures, {placebos:,} of them placebo text")
        for row in mine[np.linspace(0, len(mine) - 1, min(count, len(mine))).astype(np.int64)]:
            unit = question.units[int(rows.unit[row])]
            arm = question.spec.arms[int(question.arms[rows.unit[row]])].name
            offset = int(rows.offset[row])
            first, last = texts.offsets[rows.text[row] : rows.text[row] + 2]
            base = stream.base_tokens(rows.slot[row : row + 1])[0]
            before = tokenizer.decode(base[max(0, offset - CONTEXT_TOKENS) : offset])
            shown = tokenizer.decode(texts.tokens[first:last])
            end = offset + int(last - first)
            after = tokenizer.decode(base[end : end + CONTEXT_TOKENS])
            kind = "placebo" if rows.flags[row] & PLACEBO_FLAG else "exposure"
            lines.append(
                f"  {kind} of unit {unit.id} (arm {arm}, repetition {rows.repetition[row] + 1}) at "
                f"step {steps[row]:,}, "
                f"slot {rows.slot[row]:,}, offset {offset:,}"
            )
            lines.append(f"    ...{before!r}\n    >>> {shown!r}\n    {after!r}...")
    return "\n".join(lines)
