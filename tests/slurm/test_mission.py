"""The whole of it in one run, small: `bench/mission.py` at a tenth of its length."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import healed, testbed

__all__ = ["healed", "testbed"]
pytestmark = [pytest.mark.xdist_group("testbed"), pytest.mark.long]  # some minutes
BENCH = Path(__file__).parents[2] / "bench"
STEPS, INTERVAL = 40, 2
SIZES = ["quarter", "half", "slim", "whole"]
CONTROLS = ("aa-placebo", "positive-control")


def test_one_run_answers_for_every_size_on_two_clusters_though_a_node_is_lost(
    healed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    import mission

    told = mission.Mission(healed, tmp_path, STEPS).told(str(Path(__file__).parents[2] / "docs"))
    assert told.components == 2
    assert told.attempts[-1] == "finished"
    assert len(told.attempts) == 2
    assert told.steps_again <= 2 * INTERVAL
    assert max(told.loss_apart.values()) < mission.LOSS_APART
    assert "missing 0, repeated 0, unplanned 0" in told.audit
    assert told.wandb_steps == STEPS
    assert told.effects.keys() == {"canaries", "leaked", "facts", "one_look"}
    assert all(told.controls[name].keys() == set(SIZES) for name in CONTROLS)
    for name, found in told.effects.items():
        assert [one["member"] for one in found] == SIZES
        # The first member had no exposure of what is shown once, in the middle of the run.
        seen = [one for one in found if (name, one["member"]) != ("one_look", "quarter")]
        assert all(one["low"] < one["effect"] < one["high"] for one in seen)
