"""Answers of these tests simulate their power coarsely; tests of power ask for enough studies."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from motet.experiments.analysis import simulation

FEW = 40


@pytest.fixture(scope="module", autouse=True)
def _few_simulations() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(simulation, "SIMULATIONS", FEW)
        yield
