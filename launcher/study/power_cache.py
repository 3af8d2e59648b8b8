"""Simulated power of a run's questions before training, through the user's cache."""

from __future__ import annotations

from typing import Any

from motet.experiments.analysis import kept
from motet.experiments.analysis.power import Assumed
from motet.experiments.analysis.randomization import Repeater
from motet.experiments.design.assignment import Question
from motet.experiments.stream.random import name_key


def power_of(
    question: Question, seed: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any]:
    """Return `analysis.power.power` of an assigned question, from the cache where it is there.

    Args:
        question: with its assignment.
        seed: of the run.
        draws: repetitions of the analysis.
        alpha: level of its test.
        assumed: what nothing is known of yet.
    """
    repeater = repeater_of(question, seed, draws)
    return kept.known_power(question.experiment, repeater, alpha, assumed)


def kept_power(
    question: Question, seed: int, draws: int, alpha: float, assumed: Assumed
) -> dict[str, Any] | None:
    """Return what `power_of` kept for these arguments; None where it was never asked."""
    repeater = repeater_of(question, seed, draws)
    return kept.kept_power(question.experiment, repeater, alpha, assumed)


def repeater_of(question: Question, seed: int, draws: int) -> Repeater:
    """The repetitions that the report of the run will make."""
    key = name_key(seed, "analysis", question.name)
    return Repeater(question.design, question.arms, key, draws)
