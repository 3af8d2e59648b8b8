"""The size of the controls and the window of the positive one, before training: a control that
could not fail, or not be found, vouches for nothing.
"""

from __future__ import annotations

import math

from motet.core.errors import Problem
from motet.experiments.analysis.declared import group_scores, primary_of
from motet.experiments.analysis.measured import PLACEBO_THRESHOLD, smallest_p_of
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Question
from motet.experiments.design.study import Asking, Study
from motet.experiments.design.treatments import GLOBAL_ROLE
from motet.experiments.stream.placement import PLACEBO_FLAG

MOST_UNITS = 1_000
FEWEST_UPDATES = 100
"""From the first exposure to the judgement: a rule of thumb (docs/decisions.md, 2026-11-30)."""


def control_problems(study: Asking) -> list[Problem]:
    """Return the controls whose smallest possible p-value does not reach their threshold: .01 for
    the A/A (over their number, if there are several), alpha for a positive control.
    """
    draws = study.setting.draws
    placebos = sum(question.experiment.role == "placebo" for question in study.questions)
    problems = []
    for question in study.questions:
        if question.experiment.role in ("question", GLOBAL_ROLE):
            continue
        placebo = question.experiment.role == "placebo"
        needed = PLACEBO_THRESHOLD / placebos if placebo else study.setting.alpha
        if wrong := too_small(question, draws, needed):
            what = (
                "an A/A control that cannot fail" if placebo else "a control that cannot be found"
            )
            problems.append(Problem(sized_by(question), f"{wrong}, so this is {what}"))
    return problems


def sized_by(question: Question) -> str:
    """The setting that says how many units a question has."""
    return f"experiments.{question.name}.{'items' if question.spec.items else 'generate.count'}"


def too_small(question: Question, draws: int, needed: float) -> str | None:
    """Say why no p-value of a control can fall below `needed`, and what would work."""
    outcome = primary_of(question.experiment)
    scores = group_scores(question.experiment, outcome)
    repeater = Repeater(question.design, question.arms, 0, draws)
    smallest = smallest_p_of(question.experiment, outcome, repeater)
    if smallest < needed:
        return None
    bound = f"its p-value cannot fall below {smallest:.2g} and {needed:.2g} is needed"
    if 1 / (1 + draws) >= needed:
        return f"is judged by {draws:,} draws: {bound}; raise experiments.draws"
    units, clusters, blocks = (
        len(question.units),
        question.design.n_clusters,
        question.design.n_blocks,
    )
    size = f"gives {units} units in {clusters} clusters"
    size += f" and {blocks} blocks" if blocks > 1 else ""
    treated = [
        weight for weight, score in zip(question.design.weights, scores, strict=True) if score
    ]
    least = smallest_size(sum(treated) / sum(question.design.weights), needed)
    return f"{size}: {bound}; {least} clusters in one block would do"


def window_warnings(study: Study) -> list[Problem]:
    """Return the positive controls that are judged too few updates after they were first shown for
    a model to have learned them, though they must be found.
    """
    rows, steps = study.plan.rows, study.setting.steps
    found = []
    for question in study.questions:
        if question.experiment.role != "positive_control":
            continue
        judged = question.spec.judged_step(study.setting.steps_total)
        mine = rows.experiment == study.plan.experiments.index(question.name)
        shown = steps.step_of(rows.slot[mine & (rows.flags & PLACEBO_FLAG == 0)])
        # An exposure at step e is in update e + 1: step `judged` is the first that comes too late.
        first = int(shown.min(initial=judged))
        if judged - first < FEWEST_UPDATES:
            seen = int((shown < judged).sum())
            problem = _too_short(question, judged, first, seen, study.setting.steps_total)
            found.append(problem)
    return found


def _too_short(question: Question, judged: int, first: int, seen: int, total: int) -> Problem:
    """Say that a positive control is judged too soon, and which setting would change it."""
    where = f"experiments.{question.name}"
    message = (
        f"is judged at step {judged:,}, {judged - first:,} updates after its first exposure "
        f"({seen:,} exposures by then): in fewer than {FEWEST_UPDATES} (a rule of thumb) a model "
        "often learns too little for it to be found, and then no answer of the run is valid"
    )
    if total < FEWEST_UPDATES:
        return Problem("training.steps", f"is {total:,}: {where} {message}; train longer")
    if judged < FEWEST_UPDATES:
        return Problem(f"{where}.judge_at", f"{message}; judge later")
    return Problem(f"{where}.schedule", f"{message}; show it earlier")


def smallest_size(treated_share: float, needed: float) -> int:
    """Return how many clusters in one block can have a p-value below `needed`, when the share that
    is treated is as near to `treated_share` as whole clusters allow.
    """
    for count in range(2, MOST_UNITS):
        treated = round(count * treated_share)
        mirrored = 2 if 2 * treated == count else 1
        if mirrored / math.comb(count, treated) < needed:
            return count
    return MOST_UNITS
