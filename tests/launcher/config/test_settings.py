from __future__ import annotations

import dataclasses
import typing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.launcher.config.sections import (
    BatchSettings,
    CheckpointSettings,
    DataSettings,
    LayoutSettings,
    OptimizerSettings,
    RampSettings,
    RunSettings,
    TrainingSettings,
)
from motet.parallel.layout.layout import Layout


def sections(cls: type) -> list[type]:
    hints = typing.get_type_hints(cls)
    inner = [t for h in hints.values() for t in (h, *typing.get_args(h))]
    return [cls, *(s for t in inner if dataclasses.is_dataclass(t) for s in sections(t))]


@pytest.mark.parametrize("section", sections(RunSettings), ids=lambda s: s.__name__)
def test_every_setting_says_what_it_means(section: type) -> None:
    for field in dataclasses.fields(section):
        assert field.metadata["doc"] or field.metadata["kind"] == "hidden", field.name


def test_a_default_is_never_mutable() -> None:
    for section in sections(RunSettings):
        assert section.__dataclass_params__.frozen
        hash_free = [f.default for f in dataclasses.fields(section)]
        assert not any(isinstance(value, list | dict | set) for value in hash_free)


def ramped(first: int, stages: list[tuple[int, int]], **training: int) -> RunSettings:
    ramp = tuple(RampSettings(step, sequences) for step, sequences in stages)
    return RunSettings(
        data=DataSettings(sequence_length=16),
        batch=BatchSettings(sequences=first, ramp=ramp),
        training=TrainingSettings(**training),
    )


STAGES = st.lists(
    st.tuples(st.integers(0, 50), st.integers(1, 9)), max_size=4, unique_by=lambda stage: stage[0]
)


@given(first=st.integers(1, 9), stages=STAGES, step=st.integers(0, 80))
def test_the_first_slot_of_a_step_is_the_sum_of_the_batches_before_it(
    first: int, stages: list[tuple[int, int]], step: int
) -> None:
    settings = ramped(first, stages, steps=100)
    assert settings.slots_before(step) == sum(
        settings.batch_steps.sequences(s) for s in range(step)
    )


@given(first=st.integers(1, 9), stages=STAGES, tokens=st.integers(1, 9000))
def test_a_run_given_in_tokens_is_the_shortest_that_reads_them(
    first: int, stages: list[tuple[int, int]], tokens: int
) -> None:
    settings = ramped(first, stages, tokens=tokens)
    length = settings.data.sequence_length
    assert settings.slots_before(settings.steps) * length >= tokens
    assert settings.slots_before(settings.steps - 1) * length < tokens


def test_seeds_follow_the_run_unless_they_are_set() -> None:
    assert (RunSettings(seed=7).data_seed, RunSettings(seed=7).plan_seed) == (7, 7)
    assert RunSettings(seed=7, data=DataSettings(seed=0)).data_seed == 0


@given(st.integers(1_000, 10**11), st.integers(1_000, 10**11))
def test_larger_models_never_get_a_larger_default_learning_rate(a: int, b: int) -> None:
    small, large = sorted((a, b))
    rate = OptimizerSettings().learning_rate
    assert 3e-4 <= rate(large) <= rate(small) < 1e-2
    assert OptimizerSettings(lr=0.5).learning_rate(a) == 0.5


def test_a_python_keyword_keeps_its_name_in_yaml() -> None:
    (field,) = [f for f in dataclasses.fields(CheckpointSettings) if f.name == "async_"]
    assert field.metadata["key"] == "async"


@pytest.mark.parametrize(
    ("world_size", "given", "dp_shard"),
    [(8, None, 2), (4, None, 1), (2, None, 1), (9, None, 2), (8, 3, 3)],
)
def test_the_shards_are_what_the_other_degrees_leave_unless_they_are_given(
    world_size: int, given: int | None, dp_shard: int
) -> None:
    section = LayoutSettings(tp=2, dp_replicate=2, dp_shard=given, shares=(2, 1), recompute="full")
    layout = RunSettings(layout=section).layout_for(world_size)
    assert (layout.dp_shard, layout.tp, layout.dp_replicate) == (dp_shard, 2, 2)
    assert (layout.micro_sequences, layout.shares, layout.recompute) == (8, (2, 1), "full")


def test_every_field_of_a_layout_is_a_setting() -> None:
    settings = {field.name for field in dataclasses.fields(LayoutSettings)}
    assert {field.name for field in dataclasses.fields(Layout)} <= settings
