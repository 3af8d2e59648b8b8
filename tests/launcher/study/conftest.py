"""Runs of these tests are judged by few simulated studies of power, which is no matter here."""

from __future__ import annotations

import pytest

from motet.experiments.analysis import simulation


@pytest.fixture(autouse=True)
def few_simulations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simulation, "SIMULATIONS", 20)
