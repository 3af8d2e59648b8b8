"""Designs that cannot answer are refused, and those that answer weakly are warned of, before any
money is spent.
"""

from __future__ import annotations

import numpy as np

from motet.core.errors import Problem
from motet.experiments.analysis.declared import comparison_of, primary_of, treatment_values
from motet.experiments.analysis.measured import smallest_p
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Question
from motet.experiments.design.declared import declared_test
from motet.experiments.design.study import Study
from motet.experiments.library import generate

FEW_CONTROLS = 16
"""With fewer held-out clusters, 95 % intervals of shares held the truth in 75 to 90 % of runs."""


def answer_problems(study: Study) -> list[Problem]:
    """Return the questions that no outcome could answer: an empty arm, one cluster only, or a
    smallest possible p-value above what Holm's correction needs for the first of them.
    """
    questions = [one for one in study.questions if one.experiment.role == "question"]
    needed = study.setting.alpha / max(1, len(questions))
    found = [_unanswerable(question, study.setting.draws, needed) for question in questions]
    return [problem for problem in found if problem is not None]


def _unanswerable(question: Question, draws: int, needed: float) -> Problem | None:
    """Say why no outcome could answer a question, and what would help; None where one could."""
    where = f"experiments.{question.name}"
    source = f"{where}.{'items' if question.spec.items else 'generate.count'}"
    design, arms = question.design, question.spec.arms
    size = f"gives {len(question.units)} units in {design.n_clusters} clusters"
    if design.n_clusters == 1 and len(question.units) > 1:
        message = (
            "puts all units in one cluster, so they all get the same arm; near-duplicates share "
            "half of their words: give texts that differ, an attribute to cluster by, or 'none'"
        )
        return Problem(f"{where}.cluster_by", message)
    empty = [arm.name for number, arm in enumerate(arms) if not (question.arms == number).any()]
    if empty:
        message = f"{size} for {len(arms)} arms, so no unit is in {', '.join(empty[:5])}"
        more = (
            "give more units or fewer arms" if design.n_clusters < 2 * len(arms) else "weigh less"
        )
        return Problem(source, f"{message}; {more}")
    outcome = primary_of(question.experiment)
    repeater = Repeater(design, question.arms, 0, draws)
    omnibus = declared_test(question.experiment, outcome) == "omnibus"
    values = treatment_values(question.experiment, outcome)
    smallest = smallest_p(repeater, values, omnibus)
    if smallest <= needed:
        return None
    if 1 / (1 + draws) > needed:
        message = f"is {draws:,}, so no p-value is below {smallest:.2g} and {needed:.2g} is needed"
        return Problem("experiments.draws", f"{message}; raise it")
    message = (
        f"{size} and {design.n_blocks} blocks: no result can have a p-value below {smallest:.2g}, "
        f"and {needed:.2g} is needed after Holm's correction; give more units or clusters, larger "
        "blocks or fewer arms"
    )
    return Problem(source, message)


def answer_warnings(study: Study) -> list[Problem]:
    """Return the questions whose answer will be weak: few held-out clusters."""
    found = []
    for question in study.questions:
        if question.experiment.role != "question":
            continue
        outcome = primary_of(question.experiment)
        comparison = comparison_of(
            question.experiment, outcome, Repeater(question.design, question.arms, 0, 1)
        )
        if comparison is None:
            continue
        control = comparison.score[comparison.arms] == 0
        clusters = len(np.unique(comparison.clusters[control]))
        found += _unlike_references(question)
        where = f"experiments.{question.name}.doses"
        if clusters == 1:
            message = "leaves a single held-out cluster: how much held-out units vary is not known"
            found.append(Problem(where, f"{message}; give more units, or fewer arms"))
        elif clusters < FEW_CONTROLS and outcome.binary:
            message = (
                f"leaves {clusters} held-out clusters: 95 % intervals of shares hold the truth in "
                f"75 to 90 % of runs with so few (p-values stay exact); {FEW_CONTROLS} would do"
            )
            found.append(Problem(where, message))
    return found


def _unlike_references(question: Question) -> list[Problem]:
    """Canaries whose secrets hold letters while their references are random letters."""
    if question.spec.use != "memorization":
        return []
    first = question.units[0]
    secret, reference = (item.target.strip() for item in first.items[:2])
    letters = generate.Chooser(question.name, "reference", first.id)
    spelled = generate.resample_secret(letters, secret) == reference
    if sum(letter.isalpha() for letter in secret) < 2 or not spelled:
        return []
    message = (
        f"the secret {secret!r} of {first.id!r} holds letters, and is ranked among random "
        f"ones such as {reference!r}; a name or a word outranks those before it is "
        "ever shown, so nothing is left to learn: give each row `references` that were drawn as "
        "its secret was (names for a name), or use digits"
    )
    return [Problem(f"experiments.{question.name}.items", message)]
