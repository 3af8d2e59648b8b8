"""What members are evaluated on counts as read where maps of learned operators read it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motet.launcher.rank import evaluating
from motet.models.family.base import Member

LENGTH, SEQUENCES, STEPS = 64, 8, 10


def test_sequences_that_maps_learn_on_are_no_unseen_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def held_out(stream: Any, count: int, slots: int) -> Any:
        asked.append(slots)
        return SimpleNamespace(tokens_BT=np.zeros((count, LENGTH)))

    monkeypatch.setattr(evaluating, "HeldOutSequences", held_out)
    monkeypatch.setattr(evaluating, "open_stream", lambda settings: None)
    settings: Any = SimpleNamespace(
        metrics=SimpleNamespace(evaluate_every=0.1, evaluate_sequences=4),
        probes=SimpleNamespace(batch_tokens=512),
        data=SimpleNamespace(sequence_length=LENGTH),
        steps=STEPS,
        slots_before=lambda step: step * SEQUENCES,
    )
    members = {"small": Member("small", None, ())}  # type: ignore[arg-type]
    grew = [{"name": "small"}, {"name": "whole", "learning_tokens": 12 * LENGTH}]
    for stages in ((), grew):
        assert evaluating.MemberEvaluation.of_run(settings, members, stages)
    assert asked == [STEPS * SEQUENCES, STEPS * SEQUENCES + 12]
