"""Where experiments that add noise to input embeddings cannot train: told before a
rank starts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from motet.core.errors import Problem
from motet.experiments.design.assignment import Question
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.described_model import model_of
from motet.models.family.base import WHOLE
from motet.parallel.engines.refusals import noise_refusal


def noise_problems(questions: Sequence[Question], settings: RunSettings) -> Iterator[Problem]:
    """Yield why a run cannot add the noise that its experiments ask for, and what would work."""
    for question in questions:
        if not question.experiment.noise_deviation:
            continue
        where = f"experiments.{question.name}.use"
        if settings.family.kind != WHOLE:
            message = (
                f"adds noise to input embeddings of one width, and family.kind="
                f"{settings.family.kind} trains members of others; use family.kind=whole"
            )
            yield Problem(where, message)
        model, _ = model_of(settings)
        why = noise_refusal(settings.layout, model.n_experts > 0)
        if why:
            yield Problem(where, f"adds noise to input embeddings; {why}")
