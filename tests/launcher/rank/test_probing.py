"""What probes say of scores that a class cannot measure."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.launcher.rank import probing
from motet.launcher.rank.probing import ProbeSet


def test_a_class_that_fails_on_true_scores_costs_its_own_means_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def series_of(experiment: str, units: object, scores: object) -> dict[str, Any]:
        if experiment == "bad":
            raise UserError("my_file.py:7: ValueError: never that long")
        return {"bits": np.array([1.0, 3.0])}

    monkeypatch.setattr(probing, "series_of", series_of)
    spec = SimpleNamespace(arms=[SimpleNamespace(name="held-out"), SimpleNamespace(name="shown")])
    probes: Any = ProbeSet.none()
    for name in ("bad", "good"):
        question = SimpleNamespace(experiment=name, units=[], spec=spec, arms=np.array([0, 1]))
        probes.questions[name] = question
    means = probes.means({"bad": None, "good": None})
    assert means == {"bad": {}, "good": {"bits/held-out": 1.0, "bits/shown": 3.0}}
    assert probes.failed == {"bad": "my_file.py:7: ValueError: never that long"}
