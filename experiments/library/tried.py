"""A class of one's own, tried without a run: its units, and what it makes of invented scores."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import raise_problems
from motet.experiments.design.assignment import Question, ask
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.trial import series_of, trial_problems
from motet.experiments.library.kinds import Library
from motet.experiments.types import F64, Generated, ItemScores, ProbeItem, Unit

STEPS = 1000

LogprobOf = Callable[[Unit, ProbeItem], float]
TextOf = Callable[[Unit, ProbeItem], str]


class TriedExperiment:
    """An experiment as a run would ask it; `motet.try_experiment` makes one.

    Attributes:
        units: of the experiment.
        arms: {arm: ids of its units}, as they would be drawn.
    """

    def __init__(self, question: Question) -> None:
        self._question = question
        self.units: list[Unit] = list(question.units)
        names = [arm.name for arm in question.spec.arms]
        self.arms: dict[str, list[str]] = {name: [] for name in names}
        for unit, arm in zip(question.units, question.arms, strict=True):
            self.arms[names[int(arm)]].append(unit.id)

    def measure(
        self, logprob: LogprobOf | None = None, written: TextOf | None = None
    ) -> dict[str, F64]:
        """Return {series: one value per unit} that the class makes of invented scores.

        Args:
            logprob: of an item's target, nats; -1 where it is left out.
            written: after the prompt of an item that asks for text; nothing where it is left out.

        Raises:
            UserError: a mistake in the class, with file and line.
        """
        logprob = logprob or (lambda unit, item: -1.0)
        written = written or (lambda unit, item: "")
        pairs = [(unit, item) for unit in self.units for item in unit.items]
        values = np.array([logprob(unit, item) for unit, item in pairs], dtype=np.float64)
        n_bytes = np.array([len(item.target.encode()) for _, item in pairs], dtype=np.int64)
        generated = None
        if any(item.max_tokens for _, item in pairs):
            texts = tuple(written(unit, item) if item.max_tokens else "" for unit, item in pairs)
            nothing = np.empty(0, dtype=np.int64)
            ended = np.ones(len(pairs), dtype=bool)
            generated = Generated(texts, (nothing,) * len(pairs), ended)
        words = np.array([max(1, len(item.target.split())) for _, item in pairs], dtype=np.int64)
        scores = ItemScores(values, words, n_bytes, values > -0.1, generated)
        return series_of(self._question.experiment, self._question.units, scores)


def try_experiment(use: str, folder: str | Path = ".", **settings: Any) -> TriedExperiment:
    """Return an experiment as a run of 1,000 steps would ask it, without a run.

    Args:
        use: `my_file.py:Class`, `package.module:Class`, or a name of `motet experiments list`.
        folder: where the file and `items` lie.
        settings: of the experiment, as in run.yaml.

    Raises:
        UserError: whatever `motet experiments check` would say of the experiment by itself.
    """
    library = Library(Path(folder))
    entry = {"name": "tried", "use": use, **settings}
    specs, problems = parse_experiments([entry], Path(folder), library)
    raise_problems(problems)
    question = ask(specs[0], 0, library)
    raise_problems(trial_problems(question, STEPS))
    return TriedExperiment(question)
