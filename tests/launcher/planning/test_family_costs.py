"""What a plan says of a family: who passes over a token how often, and which layouts it needs."""

from __future__ import annotations

from typing import Any

import pytest

from motet.launcher.config.sections import FamilySettings, RunSettings, TrainingSettings
from motet.launcher.planning.family_costs import PlannedFamily
from motet.launcher.planning.family_facts import sampled_steps
from motet.models.config import ModelConfig
from motet.models.family.costs import mean_passes
from motet.parallel.layout.layout import Layout

WHOLE = ModelConfig(64, 64, 4, 4, 2, 128)
OPTIONS: dict[str, Any] = {"members": {"half": {"d_ffn": 0.5}}, "sampler": "joint", "draws": 1}
TAUGHT = {"loss": "distill", "distill_weight": 1.0}


def planned(**options: Any) -> PlannedFamily:
    family = FamilySettings(kind="nested", options=OPTIONS | options)
    settings = RunSettings(name="r", family=family, training=TrainingSettings(steps=400))
    return PlannedFamily(settings, WHOLE)


@pytest.mark.parametrize(
    ("options", "passes", "taught"),
    [
        ({}, {"whole": 1.0, "half": 1.0}, False),
        (TAUGHT | {"distill_from_step": 0}, {"whole": 1.0, "half": 1.0}, True),
        # A second set of the whole model's weights runs forward, and the member learns from it.
        (
            TAUGHT | {"teacher": "ema", "ema_steps": 400, "distill_from_step": 0},
            {"whole": 4 / 3, "half": 1.0},
            True,
        ),
    ],
    ids=["labels", "largest", "averaged"],
)
def test_a_kept_teacher_is_a_pass_and_who_follows_it_alone_trains(
    options: dict[str, Any], passes: dict[str, float], taught: bool
) -> None:
    made = planned(**options)
    members = {member.name: member for member in made.members}
    found = mean_passes(made.family, members, sampled_steps(made.settings), 1)
    assert found.passes == pytest.approx(passes)
    assert found.taught == taught


def test_a_plan_leaves_out_layouts_that_lack_what_the_family_asks_for() -> None:
    frozen = TAUGHT | {"teacher": "frozen", "teacher_step": 10}
    assert planned().refusal(Layout(pp=2)) == ""
    assert planned(**frozen).refusal(Layout(dp_shard=2)) == ""
    for options in (frozen, {"order_at_step": 10}):
        assert planned(**options).refusal(Layout(pp=2)) != ""
    assert planned(mask_update=True).refusal(Layout(engine="deepspeed", dp_shard=2)) != ""


@pytest.mark.parametrize("last", [{"operator": "prune"}, {"operator": "stack", "distill": {}}])
def test_a_plan_leaves_out_layouts_in_which_a_stage_cannot_begin(last: dict[str, Any]) -> None:
    pruned = "prune" in last["operator"]
    sizes = {"model": {"d_ffn": 256}} if pruned else {"depth": 0.5}
    before = {"name": "before", **sizes, "steps": 150}
    family = FamilySettings(kind="progressive", options={"stages": [before, last]})
    settings = RunSettings(name="r", family=family, training=TrainingSettings(steps=400))
    planned = PlannedFamily(settings, WHOLE)
    assert planned.refusal(Layout(dp_shard=2)) == ""
    assert planned.refusal(Layout(pp=2)).startswith("layout.pp=2: ")
