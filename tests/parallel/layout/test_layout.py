from __future__ import annotations

import dataclasses
import math
import re
import subprocess
import sys
from itertools import product
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from motet.models.config import ModelConfig
from motet.parallel.layout.layout import SCHEDULES, Layout, balanced_stages, head_in_layers
from motet.parallel.layout.nearest import nearest
from motet.parallel.layout.rules import micro_batches, problems, schedule_takes, step_unit

MODEL = ModelConfig(vocabulary_size=320, d_model=48, n_layers=6, n_heads=12, n_kv_heads=4, d_ffn=96)
MOE = dataclasses.replace(MODEL, n_experts=8, d_expert=24)
LENGTH = 64
FEW = st.sampled_from([1, 1, 1, 2, 2, 3, 4])


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Any values that a person could write, sound or not."""
    pp, virtual, replicas = draw(FEW), draw(st.sampled_from([1, 1, 2, 3])), draw(FEW)
    return Layout(
        engine=draw(st.sampled_from(["native", "native", "native", "deepspeed"])),
        dp_replicate=replicas,
        dp_shard=draw(FEW),
        tp=draw(FEW),
        pp=pp,
        cp=draw(FEW),
        ep=draw(FEW),
        etp=draw(FEW),
        virtual_stages=virtual,
        schedule=draw(st.sampled_from(SCHEDULES))
        if virtual > 1
        else draw(st.sampled_from(SCHEDULES[:2])),
        stage_layers=draw(
            st.sampled_from(
                [(), balanced_stages(6, pp * virtual, 1.0), (0, 6), (2, 0, 4), (1, 2, 3)]
            )
        ),
        micro_sequences=draw(st.integers(1, 4)),
        sequence_parallel=draw(st.booleans()),
        vocabulary_parallel=draw(st.booleans()),
        shares=draw(st.sampled_from([(), (1,) * replicas, tuple(range(1, replicas + 1)), (2, 1)])),
    )


def schedule_is_sound(layout: Layout) -> bool:
    if layout.pp == 1:
        return layout.virtual_stages == 1 and layout.schedule in ("gpipe", "1f1b")
    if layout.schedule in ("gpipe", "1f1b"):
        return layout.virtual_stages == 1
    if layout.schedule == "zbv_zero_bubble":
        return layout.virtual_stages == 2
    return layout.virtual_stages >= 2


def stages_are_sound(layout: Layout, model: ModelConfig) -> bool:
    if layout.pp > 1 and model.tied_embeddings:
        return False
    if not layout.stage_layers:
        return layout.stages <= model.n_layers
    held = [len(layers) for layers in layout.layers_of_stages(model)]
    return len(held) == layout.stages and sum(held) == model.n_layers and all(held[1:-1])


def tensors_are_sound(layout: Layout, model: ModelConfig, length: int) -> bool:
    parts = [model.n_heads, model.n_kv_heads]
    parts += [] if model.n_experts else [model.d_ffn]
    parts += [model.vocabulary_size] if layout.vocabulary_parallel else []
    chunk = length / (2 * layout.cp) if layout.cp > 1 else length
    chunk = chunk / layout.tp if layout.tp > 1 and layout.sequence_parallel else chunk
    return chunk == int(chunk) and all(size % layout.tp == 0 for size in parts)


def experts_are_sound(layout: Layout, model: ModelConfig) -> bool:
    if not model.n_experts:
        return layout.ep == layout.etp == 1
    inside = layout.dp_shard * layout.cp * layout.tp
    groups = inside / (layout.ep * layout.etp)
    return (
        groups == int(groups)
        and model.d_model % groups == 0
        and model.n_experts % layout.ep == 0
        and model.expert_width % layout.etp == 0
        and (layout.tp == 1 or layout.sequence_parallel)
    )


def batch_is_sound(layout: Layout, sequences: int) -> bool:
    """Count micro-batches of one data-parallel rank after another, without the rules."""
    shares = layout.shares or (1,) * layout.dp_replicate
    for share in shares:
        count = sequences * share / (sum(shares) * layout.dp_shard * layout.micro_sequences)
        whole = sequences / (sum(shares) * layout.dp_shard * layout.micro_sequences)
        if whole != int(whole) or not schedule_takes(layout, int(count)):
            return False
    return True


def is_sound(layout: Layout, model: ModelConfig, length: int, sequences: int, world: int) -> bool:
    degrees = (layout.dp_replicate, layout.dp_shard, layout.tp, layout.pp, layout.cp)
    native = layout.engine == "native"
    alone = layout.tp == layout.pp == layout.cp == layout.ep == layout.etp == 1
    return (
        math.prod(degrees) == world
        and (native or (alone and len(set(layout.shares)) <= 1))
        and (not layout.shares or len(layout.shares) == layout.dp_replicate)
        and schedule_is_sound(layout)
        and stages_are_sound(layout, model)
        and tensors_are_sound(layout, model, length)
        and experts_are_sound(layout, model)
        and batch_is_sound(layout, sequences)
    )


def small(text: str) -> list[int]:
    return [int(n.replace(",", "")) for n in re.findall(r"\d[\d,]*", text)]


@settings(max_examples=600, deadline=None)
@given(
    layout=layouts(),
    model=st.sampled_from([MODEL, MOE]),
    tied=st.booleans(),
    length=st.sampled_from([60, 64, 96]),
    sequences=st.sampled_from([7, 12, 24, 48, 144]),
    extra=st.sampled_from([0, 0, 0, 1]),
)
def test_a_layout_without_problems_is_one_that_obeys_every_rule(
    layout: Layout, model: ModelConfig, tied: bool, length: int, sequences: int, extra: int
) -> None:
    model = dataclasses.replace(model, tied_embeddings=tied)
    world = layout.world_size + extra
    found = problems(layout, model, length, [sequences], world)
    assert (not found) == is_sound(layout, model, length, sequences, world), found


CHANGES = {
    "layout.processes": ("world", None),
    "data.sequence_length": ("length", None),
    "batch.sequences": ("sequences", None),
}


@settings(max_examples=400, deadline=None)
@given(
    layout=layouts(),
    model=st.sampled_from([MODEL, MOE]),
    length=st.integers(8, 200),
    sequences=st.integers(1, 200),
    world=st.integers(1, 40),
)
def test_the_nearest_values_are_valid_and_nothing_nearer_is(
    layout: Layout, model: ModelConfig, length: int, sequences: int, world: int
) -> None:
    def told(layout: Layout = layout, **changed: int) -> dict[str, str]:
        given = {"length": length, "sequences": sequences, "world": world} | changed
        return dict(problems(layout, model, given["length"], [given["sequences"]], given["world"]))

    for setting, message in told().items():
        if "nearest: " not in message or setting in ("layout.placement", "layout.shares"):
            continue
        values = small(re.split(r"nearest: ([\d, and]+)", message)[1])
        assert values
        name = setting.removeprefix("layout.")
        for value in values:
            if setting in CHANGES:
                after = told(**{CHANGES[setting][0]: value})
            elif name in ("ep", "etp", "tp", "pp", "cp", "virtual_stages"):
                after = told(dataclasses.replace(layout, **{name: value}))
            else:
                raise AssertionError(setting)
            assert setting not in after, (value, after[setting])
        if setting == "batch.sequences":
            assert all(v % step_unit(layout) == 0 for v in values)
            between = (
                range(min(values) + 1, max(values)) if len(values) == 2 else range(1, values[0])
            )
            assert all("batch.sequences" in told(sequences=n) for n in between)


def test_every_problem_is_told_at_once_each_with_what_would_work() -> None:
    layout = Layout(
        dp_replicate=2,
        dp_shard=2,
        tp=5,
        pp=4,
        cp=3,
        virtual_stages=2,
        shares=(1,),
        placement=(0, 0),
    )
    found = dict(problems(layout, dataclasses.replace(MODEL, tied_embeddings=True), 100, [10], 64))
    assert found["layout.processes"] == (
        "64 ranks (layout.processes x nodes) are not a multiple of dp_replicate 2 x tp 5 x pp 4 x "
        "cp 3 = 120; "
        "nearest: 120 ranks"
    )
    assert found["layout.tp"] == (
        "5 does not divide model.n_heads=12 and model.n_kv_heads=4 and model.d_ffn=96; nearest: 4"
    )
    assert found["layout.virtual_stages"].endswith("nearest: 1, or set interleaved_1f1b")
    assert found["layout.pp"].endswith("= 8 stages, but the model has 6 layers; nearest: 3")
    assert found["data.sequence_length"].endswith(
        "30 (2 x layout.cp 3 x layout.tp 5); nearest: 90 and 120"
    )
    assert found["layout.shares"] == "[1] has 1 numbers for layout.dp_replicate=2; nearest: [1, 1]"
    assert "model.tied_embeddings" in found
    assert "layout.placement" in found
    assert len(found) == 8


@pytest.mark.parametrize(
    ("layout", "model", "told"),
    [
        (Layout(dp_shard=2), MODEL, {"layout.dp_shard": "dp_shard=4 fits"}),
        (Layout(dp_shard=4, ep=3), MOE, {"layout.ep": "nearest: 2 and 4"}),
        (Layout(dp_shard=4, ep=2), MODEL, {"layout.ep": "needs experts"}),
        (Layout(dp_shard=2, tp=2, etp=4, ep=2), MOE, {"layout.ep": "nearest: 1"}),
        (Layout(tp=4, sequence_parallel=False), MOE, {"layout.sequence_parallel": "set true"}),
        (
            Layout(pp=4, stage_layers=(1, 2, 3)),
            MODEL,
            {
                "layout.stage_layers": "has 3 numbers for 4 stages "
                "(pp x virtual_stages); [1, 2, 2, 1] fits"
            },
        ),
        (
            Layout(pp=4, stage_layers=(2, 0, 2, 2)),
            MODEL,
            {"layout.stage_layers": "stage 1 without"},
        ),
        (Layout(pp=4, stage_layers=(0, 3, 3, 0)), MODEL, {}),
        (Layout(pp=4, schedule="interleaved_1f1b"), MODEL, {"layout.virtual_stages": "nearest: 2"}),
        (
            Layout(dp_shard=4, schedule="zbv_zero_bubble"),
            MODEL,
            {"layout.schedule": "pp of at least 2"},
        ),
        (
            Layout(pp=4, micro_sequences=8),
            MODEL,
            {"batch.sequences": "2 micro-batches per replica"},
        ),
        (
            Layout(tp=4, engine="deepspeed"),
            MODEL,
            {"layout.tp": "more than layout.engine=deepspeed"},
        ),
        (
            Layout(dp_shard=4, placement=(0, 2, 2, 5)),
            MODEL,
            {"layout.placement": "nearest: [0, 2, 1, 3]"},
        ),
        (Layout(dp_shard=4, placement=(3, 1, 0, 2)), MODEL, {}),
        (
            Layout(dp_shard=0, micro_sequences=0),
            MODEL,
            {"layout.dp_shard": "1", "layout.micro_sequences": "1"},
        ),
        (Layout(dp_replicate=2, dp_shard=2, shares=(3, 1)), MODEL, {}),
        (Layout(dp_shard=4), dataclasses.replace(MOE, d_model=42), {"layout.ep": "42"}),
    ],
)
def test_one_mistake_is_one_problem(
    layout: Layout, model: ModelConfig, told: dict[str, str]
) -> None:
    found = dict(problems(layout, model, LENGTH, [16], 4))
    assert set(found) == set(told), found
    for setting, piece in told.items():
        assert piece in found[setting], found[setting]


def test_the_stages_of_a_ramp_are_named_by_their_place() -> None:
    found = problems(Layout(dp_shard=4, micro_sequences=2), MODEL, LENGTH, [16, 24, 10, 4], 4)
    assert found == [
        (
            "batch.ramp.1.sequences",
            "10 is not a multiple of 8 (layout.micro_sequences 2 x 4 for dp_shard 4); nearest: 8 "
            "and 16",
        ),
        (
            "batch.ramp.2.sequences",
            "4 is not a multiple of 8 (layout.micro_sequences 2 x 4 for dp_shard 4); nearest: 8",
        ),
    ]


def test_a_vocabulary_that_is_not_known_yet_breaks_no_rule() -> None:
    layout = Layout(tp=3)
    model = dataclasses.replace(MODEL, n_kv_heads=12)
    assert [s for s, _ in problems(layout, model, 96, [1], 3)] == ["layout.tp"]  # 320 rows
    unknown = dataclasses.replace(model, vocabulary_size=0)
    assert problems(layout, unknown, 96, [1], 3) == []


@given(layout=layouts(), data=st.data())
def test_every_rank_has_a_place_of_its_own(layout: Layout, data: st.DataObject) -> None:
    size = layout.world_size
    order = data.draw(st.permutations(range(size)))
    layout = dataclasses.replace(layout, placement=tuple(order))
    places = {layout.place(rank) for rank in range(size)}
    degrees = (layout.pp, layout.dp_replicate, layout.dp_shard, layout.cp, layout.tp)
    assert {dataclasses.astuple(place) for place in places} == set(product(*map(range, degrees)))
    assert sorted(layout.rank_of_process(process) for process in range(size)) == list(range(size))
    assert [layout.rank_of_process(process) for process in order] == list(range(size))
    for dp_rank in range(layout.dp_size):
        mine = [rank for rank in range(size) if layout.dp_rank(rank) == dp_rank]
        assert len(mine) == layout.pp * layout.cp * layout.tp
        assert sum(layout.is_dp_leader(rank) for rank in mine) == 1


@given(
    shares=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dp_shard=st.integers(1, 4),
    micro=st.integers(1, 3),
    units=st.integers(1, 5),
)
def test_the_data_parallel_ranks_take_every_sequence_of_a_step_once_in_proportion_to_their_shares(
    shares: list[int], dp_shard: int, micro: int, units: int
) -> None:
    layout = Layout(
        dp_replicate=len(shares), dp_shard=dp_shard, shares=tuple(shares), micro_sequences=micro
    )
    sequences = units * step_unit(layout)
    assert problems(layout, None, LENGTH, [sequences], None) == []
    taken = [layout.dp_sequences(sequences, dp_rank) for dp_rank in range(layout.dp_size)]
    assert [s for first, count in taken for s in range(first, first + count)] == list(
        range(sequences)
    )
    for dp_rank, (_, count) in enumerate(taken):
        replica = dp_rank // dp_shard
        assert count == units * micro * shares[replica]
        assert count == micro * micro_batches(layout, sequences)[replica]


@given(
    n_layers=st.integers(1, 60),
    pp=st.integers(1, 8),
    virtual=st.integers(1, 4),
    vocabulary=st.integers(1, 4000),
)
def test_balanced_stages_hold_every_layer_and_the_longest_is_as_short_as_it_can_be(
    n_layers: int, pp: int, virtual: int, vocabulary: int
) -> None:
    stages = pp * virtual
    assume(stages <= n_layers)
    model = ModelConfig(vocabulary, 32, n_layers, 4, 4, 64)
    layout = Layout(
        pp=pp, virtual_stages=virtual, schedule="gpipe" if virtual == 1 else SCHEDULES[2]
    )
    held = layout.layers_of_stages(model)
    assert [layer for layers in held for layer in layers] == list(range(n_layers))
    counts = [len(layers) for layers in held]
    assert all(counts[:-1])
    if stages > 1:
        head = head_in_layers(model)
        longest = max(*counts, counts[-1] + head)
        shorter = [longest - 1e-9] * (stages - 1) + [longest - 1e-9 - head]
        assert sum(int(room) for room in shorter if room >= 0) < n_layers or head >= longest - 1e-9
    ranks = sorted(stage for rank in range(pp) for stage in layout.stages_of(rank))
    assert ranks == list(range(stages))


def test_both_arms_of_the_v_lie_on_one_rank() -> None:
    layout = Layout(pp=3, virtual_stages=2, schedule="zbv_zero_bubble")
    assert [layout.stages_of(rank) for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


def test_nearest_values_lie_on_both_sides() -> None:
    even: Any = lambda n: n % 2 == 0  # noqa: E731
    assert nearest(5, even, 1, 10) == [4, 6]
    assert nearest(1, even, 1, 10) == [2]
    assert nearest(11, even, 1, 10) == [10]
    assert nearest(5, lambda n: False, 1, 10) == []


@pytest.mark.parametrize(
    "module",
    ["layout.layout", "layout.rules", "layout.weights", "layout.collectives", "cost.timeline"],
)
def test_a_laptop_without_torch_can_check_a_layout(module: str) -> None:
    code = f"import sys, motet.parallel.{module}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"torch", "numpy"} & set(done.stdout.split())
