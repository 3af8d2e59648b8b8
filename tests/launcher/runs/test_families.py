"""Which layouts cannot train the family of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.runs.families import refuse_layout
from motet.models.config import ModelConfig
from motet.models.family.base import member_facts
from motet.models.family.progressive import ProgressiveFamily
from motet.models.family.stage_lengths import RunShape
from motet.parallel.layout.layout import Layout
from tests.models.families import tiny


def frozen(whole: ModelConfig, last: dict[str, Any]) -> dict[str, Any]:
    wide = {"name": "wide", "model": {"d_ffn": 2 * whole.d_ffn}, "steps": 50}
    family = ProgressiveFamily(whole, {"stages": [wide, last]}, 0)
    family.fit(RunShape(100, 64, lambda step: 8 * step, lambda n: 1e-3, 2))
    assert family.problems(100) == []
    members = member_facts(family.members(), 64)
    return {"members": members, "stages": family.stage_facts(), "sequence_length": 64}


def test_what_is_pruned_is_measured_in_one_piece() -> None:
    whole = replace(tiny(), n_layers=4)
    manifest = frozen(whole, {"operator": "prune"})
    refuse_layout(manifest, Layout(dp_shard=2, micro_sequences=1), whole)
    with pytest.raises(UserError, match=r"layout\.pp=2: channels that are pruned"):
        refuse_layout(manifest, Layout(pp=2, micro_sequences=1), whole)


def test_a_frozen_model_is_followed_in_one_piece() -> None:
    whole = replace(tiny(), n_layers=4)
    manifest = frozen(whole, {"operator": "prune", "distill": {}})
    refuse_layout(manifest, Layout(dp_shard=2, micro_sequences=1), whole)
    with pytest.raises(UserError, match=r"layout\.pp=2: stages of a pipeline have no second model"):
        refuse_layout(manifest, Layout(pp=2, micro_sequences=1), whole)
