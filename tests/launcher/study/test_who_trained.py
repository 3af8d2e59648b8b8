"""Who trains on a slot, which units are shown and where they lie are drawn apart from each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from motet.experiments.design.assignment import ask, assign
from motet.experiments.stream.placement import compile_plan
from motet.launcher.config import run_yaml
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.families import new_family
from motet.launcher.study.before_training import library_of, specs_of
from motet.models.config import preset
from motet.models.family.base import choices
from motet.models.family.nested import NestedFamily
from motet.models.member import trained_by
from tests.experiments.analysis.test_analysis import design_of
from tests.experiments.plans import request

WHOLE = preset("1m", 512, n_layers=2, n_heads=4, n_kv_heads=2)
OPTIONS: dict[str, Any] = {"members": {"half": {"d_ffn": 0.5}}, "sampler": "uniform"}
FAMILY = (
    "family: {kind: nested, options: {members: {half: {d_ffn: 0.5}}, sampler: uniform, draws: 4}}\n"
)
RUN = "name: r\nseed: 5\ndata: {corpora: [{path: c}]}\ntraining: {steps: 500}\n"
ASKED = "experiments: {list: [{name: canaries, use: memorization, doses: [0, 4, 16]}]}\n"


def settings_of(text: str) -> RunSettings:
    return run_yaml.load(None, [], text=text, base=Path("/nowhere"))


def draws_of(settings: RunSettings, steps: int = 50) -> list[list[tuple[str | None, ...]]]:
    family = new_family(settings, WHOLE)
    members = {member.name: member for member in family.members()}
    found = [choices(family, members, step, 4) for step in range(steps)]
    return [[trained_by(choice) for choice in step] if step else [] for step in found]


def test_the_draw_is_the_same_with_and_without_experiments_and_the_assignment_with_members() -> (
    None
):
    alone, asked = settings_of(RUN + FAMILY), settings_of(RUN + FAMILY + ASKED)
    assert draws_of(alone) == draws_of(asked)
    reseeded = replace(asked, experiments=replace(asked.experiments, seed=77))
    assert draws_of(reseeded) == draws_of(asked), "the seed of the plan does not move it"
    assert draws_of(replace(asked, seed=6)) != draws_of(asked)

    def arms(settings: RunSettings) -> dict[str, list[int]]:
        library = library_of(settings)
        specs, problems = specs_of(settings, library)
        assert not problems
        return {s.name: ask(s, settings.plan_seed, library).arms.tolist() for s in specs}

    plain = arms(settings_of(RUN + ASKED))
    assert plain == arms(asked)
    assert plain != arms(reseeded)


def test_with_one_seed_for_both_no_arm_is_shown_to_one_member_more_often_than_to_another() -> None:
    units, repetitions, batch, steps, draws = 20, 6, 8, 40, 4
    design, z = design_of(units), []
    for seed in range(150):
        arms = assign(design, seed)
        family = NestedFamily(WHOLE, OPTIONS | {"draws": draws}, seed)
        plan = compile_plan(
            [request("x", units, repetitions, (0, batch * steps), length=6)], seed, 40
        )
        small = np.array(
            [
                [terms[0].member is not None for terms in family.choose(step, draws)]  # type: ignore[union-attr]
                for step in range(steps)
            ]
        )
        share = plan.rows.slot % batch * draws // batch
        chosen = small[plan.rows.slot // batch, share]
        shown = arms[plan.rows.unit] == 1
        n, n_shown, n_chosen = len(shown), shown.sum(), chosen.sum()
        mean = n_shown * n_chosen / n
        variance = mean * (n - n_shown) * (n - n_chosen) / (n * (n - 1))
        z.append(((shown & chosen).sum() - mean) / np.sqrt(variance))
    assert abs(np.sum(z)) / np.sqrt(len(z)) < 4
    assert 0.6 < np.var(z) < 1.6
