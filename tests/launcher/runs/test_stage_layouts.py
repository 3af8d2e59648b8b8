"""Layouts of the stages of a family that grows: what they take from the run, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.config.layout import names_layouts
from motet.launcher.config.sections import BatchSettings, DataSettings, LayoutSettings, RunSettings
from motet.launcher.runs.begun import frozen_problems
from motet.launcher.runs.stage_layouts import RunLayouts, checked_layouts
from motet.models.family.base import member_facts
from motet.parallel.layout.layout import Layout
from tests.models.test_progressive import LENGTH, SEQUENCES, SMALL, STACK, family, told
from tests.models.test_progressive import WHOLE as ODD

WHOLE = replace(ODD, vocabulary_size=96)
RUN = RunSettings(
    batch=BatchSettings(sequences=SEQUENCES),
    data=DataSettings(sequence_length=LENGTH),
    layout=LayoutSettings(processes=2, micro_sequences=2, device="cpu"),
)


def layouts(layout: Any, *stages: Any, ranks: int = 2, **options: Any) -> RunLayouts:
    """Those of a run whose first stage has a layout of its own."""
    growing = family({**SMALL, "layout": layout}, *(stages or [STACK]), whole=WHOLE)
    manifest = {
        "members": member_facts(growing.members(), LENGTH),
        "stages": growing.stage_facts(),
        "sequence_length": LENGTH,
    }
    return checked_layouts(RUN, manifest, WHOLE, ranks, family=growing, **options)


def refusal(layout: Any, *stages: Any, **options: Any) -> str:
    with pytest.raises(UserError) as found:
        layouts(layout, *stages, **options)
    return str(found.value)


def test_a_stage_has_what_it_names_and_else_what_the_run_has() -> None:
    found = layouts({"processes": 1, "recompute": "full"})
    assert found.layouts == (
        Layout(dp_shard=1, micro_sequences=2, recompute="full"),
        Layout(dp_shard=2, micro_sequences=2),
    )
    assert layouts({"tp": 2}).of(0) == Layout(tp=2, micro_sequences=2)
    assert layouts({}).of(0) == layouts({}).of(1) == found.of(1)


def test_ranks_train_the_stages_that_have_as_many_in_the_same_places() -> None:
    same, fewer = layouts({"pp": 2}), layouts({"processes": 1})
    assert [same.runs_here(number) for number in (0, 1)] == [True, True]
    assert [fewer.runs_here(number) for number in (0, 1)] == [False, True]
    begun = layouts({"processes": 1}, ranks=1, begun=0)
    assert begun.layouts == fewer.layouts
    assert [begun.runs_here(number) for number in (0, 1)] == [True, False]
    assert not layouts({"placement": [1, 0]}).runs_here(0)


def test_a_model_grows_as_it_lay_or_divided_over_the_ranks_of_the_next_stage() -> None:
    same, fewer = layouts({"pp": 2}), layouts({"processes": 1, "micro_sequences": 4})
    assert same.holding(0, 1) == same.of(0)
    assert fewer.holding(0, 1) == Layout(dp_shard=2, micro_sequences=2)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        ({"tpp": 2}, r"stages[0].layout.tpp: is no setting (did you mean 'tp'?)"),
        ({"tp": "two"}, r"stages[0].layout.tp: two is not a whole number"),
        (
            {"device": "cuda"},
            r"stages[0].layout.device: is the same for all stages; set layout.dev",
        ),
        ({"pp": 2, "schedule": "1f2b"}, "stages[0].layout.schedule: 1f2b is not one of"),
        ({"processes": 4, "tp": 4}, "stages[0].layout.tp: stage small: 4"),
        ({"processes": 4, "pp": 4}, "stages[0].layout.pp: stage small: pp 4"),
        ({"processes": 3}, "batch.sequences: stage small: 8 is not a multiple of 6"),
        ({"tp": 2, "dp_shard": 2}, "stages[0].layout.dp_shard: stage small: "),
    ],
)
def test_a_layout_that_cannot_be_is_refused_by_the_name_of_its_stage(
    layout: dict[str, Any], why: str
) -> None:
    assert why in refusal(layout)


def test_a_stage_without_a_layout_of_its_own_is_held_to_that_of_the_run() -> None:
    middle = {"name": "middle", "depth": 0.5, "steps": 50, "operator": "identity"}
    deep = replace(RUN, layout=replace(RUN.layout, processes=4, pp=4, micro_sequences=1))
    growing = family({**SMALL, "layout": {"processes": 1, "pp": 1}}, middle, STACK, whole=WHOLE)
    with pytest.raises(UserError, match=r"layout\.pp: stage middle: pp 4"):
        checked_layouts(deep, {}, WHOLE, 4, family=growing)


def test_what_is_pruned_is_measured_by_the_ranks_that_go_on() -> None:
    wide = {"model": {"d_ffn": 2 * WHOLE.d_ffn}}
    pruned = {"operator": "prune"}
    growing = family(
        {"name": "wide", "steps": 100, **wide, "layout": {"processes": 1, "tp": 1}},
        pruned,
        whole=WHOLE,
    )
    run = replace(RUN, layout=replace(RUN.layout, processes=8, tp=2, micro_sequences=2))
    with pytest.raises(UserError, match=r"stages\[1\].operator: prune measures .* on 8 ranks"):
        checked_layouts(run, {}, WHOLE, 8, family=growing)


@pytest.mark.parametrize("layout", [{"processes": 1}, {"placement": [1, 0]}])
def test_a_job_or_several_machines_have_the_same_ranks_in_all_stages(
    layout: dict[str, Any],
) -> None:
    assert "in a job, and on several machines, all stages have the same ranks" in refusal(
        layout, alone=False
    )
    split = layouts({"pp": 2}, ranks=4, alone=False)
    assert split.of(0) == Layout(pp=2, dp_shard=2, micro_sequences=2)


def test_the_last_stage_has_the_layout_of_the_run() -> None:
    assert "stages[1].layout: the last stage has the layout of the run" in told(
        SMALL, {**STACK, "layout": {"tp": 2}}
    )


def test_layouts_of_stages_may_change_when_a_run_goes_on_and_nothing_else_of_them() -> None:
    def run(**stage: Any) -> RunSettings:
        options = {"stages": [{**SMALL, **stage}, STACK]}
        return replace(
            RUN,
            training=replace(RUN.training, steps=400),
            family=replace(RUN.family, kind="progressive", options=options),
        )

    assert names_layouts(run(layout={"tp": 2}).family.options)
    assert not names_layouts(run().family.options)
    for before, after in (({}, {"tp": 2}), ({"tp": 2}, {"pp": 2, "micro_sequences": 1})):
        assert frozen_problems(run(layout=before), run(layout=after)) == []
    assert frozen_problems(run(), run(layout={"tp": 2})) == []
    assert frozen_problems(run(), run(steps=101))
