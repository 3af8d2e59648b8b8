from __future__ import annotations

from dataclasses import replace

import pytest

from motet.models.config import ModelConfig, preset
from motet.models.counts import parameters
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import (
    Cluster,
    ClusterError,
    Group,
    Link,
    device,
    homogeneous,
)
from motet.parallel.cost.links import domain, strided
from motet.parallel.cost.memory import micro_batches_held
from motet.parallel.cost.pipeline import pipeline_s
from motet.parallel.cost.stages import NATIVE, Prediction, Predictor, Training, predict
from motet.parallel.cost.timeline import most_held, orders, timeline
from motet.parallel.cost.topology import strides, topology_of
from motet.parallel.layout.layout import SCHEDULES, Layout
from motet.parallel.layout.weights import held_bytes, kept_bytes

MODEL = preset("7b", 128_256)
MOE = replace(MODEL, n_experts=8, d_expert=4096, experts_per_token=2)
H100 = homogeneous("h100", 8, nic_gbit_s=400.0)
TRAINING = Training(512, 4096)


def told(layout: Layout, model: ModelConfig = MODEL, cluster: Cluster = H100) -> Prediction:
    return predict(model, cluster, layout, TRAINING)


def two_sites(gbit_s: float, slow: str = "h100") -> Cluster:
    fast = H100.groups[0]
    groups = [
        Group("a", fast.device, 1, 8, fast.intra_node, fast.inter_node),
        Group("b", device(slow), 1, 8, fast.intra_node, fast.inter_node),
    ]
    return Cluster(tuple(groups), {("a", "b"): Link(gbit_s / 8, 500.0, "ethernet")})


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=64, recompute="full"),
        Layout(dp_replicate=2, dp_shard=8, tp=4, recompute="selective"),
        Layout(dp_shard=8, tp=2, pp=4, virtual_stages=2, schedule="interleaved_1f1b"),
        Layout(dp_shard=8, cp=4, tp=2),
        Layout(dp_shard=16, pp=4, virtual_stages=2, schedule="zbv_zero_bubble"),
    ],
)
@pytest.mark.parametrize("model", [MODEL, MOE], ids=["dense", "experts"])
def test_the_parts_are_the_whole(layout: Layout, model: ModelConfig) -> None:
    found = told(layout, model)
    assert sum(found.parts.values()) == pytest.approx(found.step_time_s, rel=1e-9)
    assert sum(found.memory_parts.values()) == pytest.approx(found.memory_gib, rel=1e-9)
    assert max(found.stage_memory_gib) == pytest.approx(found.memory_gib)
    assert len(found.stage_time_s) == layout.pp
    assert all(value >= 0 for value in found.parts.values())
    assert found.interval_s[0] < found.step_time_s < found.interval_s[1]
    assert 0.05 < found.mfu < 0.8
    assert found.tokens_per_s == pytest.approx(512 * 4096 / found.step_time_s)


def test_more_work_takes_longer_and_a_better_link_does_not() -> None:
    base = told(Layout(dp_shard=8, tp=8))
    assert told(Layout(dp_shard=8, tp=8, recompute="full")).step_time_s > base.step_time_s
    slow = homogeneous("h100", 8, nic_gbit_s=25.0)
    assert (
        told(Layout(dp_shard=64), cluster=slow).step_time_s
        > 1.2 * told(Layout(dp_shard=64)).step_time_s
    )
    full = told(Layout(dp_shard=8, tp=8, recompute="full"))
    selective = told(Layout(dp_shard=8, tp=8, recompute="selective"))
    assert full.memory_gib < selective.memory_gib < base.memory_gib


def test_tensor_parallelism_over_nodes_is_dear() -> None:
    inside = told(Layout(dp_shard=8, tp=8)).parts["tensor"]
    outside = predict(
        MODEL, homogeneous("h100", 16, 4, 400.0, nics=1), Layout(dp_shard=8, tp=8), TRAINING
    )
    assert outside.parts["tensor"] > 3 * inside


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("rounds", [1, 2, 4, 8])
def test_the_closed_form_of_a_pipeline_is_its_timeline(schedule: str, pp: int, rounds: int) -> None:
    virtual = 1 if schedule in ("gpipe", "1f1b") else 2
    n, stages = pp * rounds, pp * virtual
    works = timeline(schedule, pp, virtual, n, [1.0] * stages, [2.1] * stages, [0.95] * stages)
    layout = Layout(pp=pp, virtual_stages=virtual, schedule=schedule)
    ranks = [[value * virtual] * pp for value in (1.0, 2.1, 0.95)]
    closed = pipeline_s(layout, n, *ranks)
    tolerance = 0.03 if schedule == "zbv_zero_bubble" else 1e-9
    assert closed == pytest.approx(max(work.end_s for work in works), rel=tolerance)


@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "interleaved_1f1b", "interleaved_zero_bubble"]
)
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_activations_are_kept_of_as_many_micro_batches_as_the_schedule_has(
    schedule: str, pp: int
) -> None:
    virtual = 1 if schedule in ("gpipe", "1f1b") else 2
    layout = Layout(pp=pp, virtual_stages=virtual, schedule=schedule)
    for n in (pp, 4 * pp):
        true = [most_held(order) / virtual for order in orders(schedule, pp, virtual, n)]
        assert [micro_batches_held(layout, rank, n) for rank in range(pp)] == pytest.approx(true)


def test_the_slowest_stage_governs_an_uneven_pipeline() -> None:
    even = told(Layout(dp_shard=16, pp=4, stage_layers=(8, 8, 8, 8), recompute="full"))
    uneven = told(Layout(dp_shard=16, pp=4, stage_layers=(4, 4, 12, 12), recompute="full"))
    assert uneven.step_time_s > 1.3 * even.step_time_s
    busy = uneven.stage_time_s
    assert busy[2] > 2.5 * busy[1]


@pytest.mark.parametrize(
    "layout",
    [
        Layout(dp_shard=4, tp=2),
        Layout(dp_replicate=2, dp_shard=2, tp=2),
        Layout(dp_shard=2, tp=2, pp=2),
    ],
)
@pytest.mark.parametrize("model", [preset("190m", 32_000), MOE], ids=["dense", "experts"])
def test_weights_gradients_and_state_are_what_the_engine_holds(
    layout: Layout, model: ModelConfig
) -> None:
    found = predict(model, homogeneous("h100", 1), layout, Training(16, 1024))
    for stage in range(layout.pp):
        exact = held_bytes(model, layout, stage)
        kept = kept_bytes(model, layout, 16 // (layout.dp_shard * layout.dp_replicate), stage, 2)
        if found.stage_memory_gib[stage] < found.memory_gib:
            continue  # the parts are told of the fullest
        for name in ("parameters", "gradients", "optimizer"):
            assert found.memory_parts[name] == pytest.approx(exact[name] / 2**30, rel=0.01)
        if sum(kept.values()):
            assert found.memory_parts["buffers"] == pytest.approx(
                sum(kept.values()) / 2**30, rel=0.02
            )


def test_where_groups_stand_by_formula_is_where_they_stand_by_enumeration() -> None:
    cluster = homogeneous("h100", 4, 8)
    layout = Layout(dp_replicate=2, dp_shard=2, tp=4, pp=2)
    for name, (ranks, stride) in strides(layout).items():
        listed = domain(cluster, [stride * i for i in range(ranks)])
        assert strided(cluster.groups[0], ranks, stride) == listed, name
    in_order = replace(layout, placement=tuple(range(32)))
    by_list, by_formula = topology_of(cluster, in_order), topology_of(cluster, layout)
    assert by_list.stages[0].data == by_formula.stages[0].data
    assert by_list.stages[0].tp == by_formula.stages[0].tp


@pytest.mark.parametrize("pp", [2, 8, 16])
@pytest.mark.parametrize("virtual", [1, 2])
def test_only_hops_that_leave_a_node_are_slow(pp: int, virtual: int) -> None:
    cluster = homogeneous("h100", 4, 8)
    schedule = "interleaved_1f1b" if virtual > 1 else "1f1b"
    layout = Layout(tp=32 // pp, pp=pp, virtual_stages=virtual, schedule=schedule)
    by_formula = topology_of(cluster, layout)
    by_list = topology_of(cluster, replace(layout, placement=tuple(range(32))))
    hops = [stage.hop for stage in by_formula.stages]
    assert hops == [stage.hop for stage in by_list.stages]
    crossing = sum(hop.nodes == 2 for hop in hops)
    assert crossing == (2 if pp == 2 else 3 + (virtual > 1))


def test_pipelines_cross_a_slow_link_better_than_data_parallelism_does() -> None:
    cluster = two_sites(10.0)
    across = predict(MODEL, cluster, Layout(dp_shard=8, pp=2, recompute="full"), TRAINING)
    apart = predict(MODEL, cluster, Layout(dp_shard=16, recompute="full"), TRAINING)
    assert apart.step_time_s > 2 * across.step_time_s
    assert any("devices differ" in word for word in across.trust)


def test_the_slower_site_governs_until_it_gets_fewer_layers() -> None:
    cluster = two_sites(100.0, "a100-80")
    even = Layout(dp_shard=8, pp=2, stage_layers=(16, 16), recompute="full")
    fair = replace(even, stage_layers=(22, 10))
    slow, fast = (predict(MODEL, cluster, one, TRAINING) for one in (even, fair))
    assert fast.step_time_s < 0.85 * slow.step_time_s
    assert slow.stage_time_s[1] > 1.5 * slow.stage_time_s[0]


def test_a_placement_says_which_devices_a_stage_has() -> None:
    cluster = two_sites(100.0, "a100-80")
    layout = Layout(dp_shard=8, pp=2, stage_layers=(22, 10), recompute="full")
    swapped = replace(layout, placement=(*range(8, 16), *range(8)))
    straight, crossed = (predict(MODEL, cluster, one, TRAINING) for one in (layout, swapped))
    assert crossed.step_time_s > 1.5 * straight.step_time_s


def test_uneven_shares_let_a_slow_replica_do_less() -> None:
    cluster = two_sites(100.0, "a100-80")
    equal = Layout(dp_replicate=2, dp_shard=8, recompute="full")
    fair = replace(equal, shares=(5, 3))
    slow, fast = (predict(MODEL, cluster, one, Training(512, 4096)) for one in (equal, fair))
    assert fast.step_time_s < slow.step_time_s


def test_expert_parallelism_inside_a_node_moves_rows_cheaper_than_across_nodes() -> None:
    training = Training(512, 4096)
    inside = predict(MOE, H100, Layout(dp_shard=64, ep=8), training)
    one_each = predict(MOE, homogeneous("h100", 64, 1, 400.0), Layout(dp_shard=64, ep=8), training)
    assert one_each.parts["experts"] > 3 * inside.parts["experts"]


def test_probes_offload_and_zero_stages_cost_what_they_are() -> None:
    layout = Layout(dp_shard=64, recompute="full")
    base = predict(MODEL, H100, layout, TRAINING)
    tokens = 512 * 4096
    probed = predict(MODEL, H100, layout, replace(TRAINING, probe_tokens=tokens / 10))
    assert probed.parts["probes"] == pytest.approx(0.1 / 3 * base.step_time_s, rel=0.05)
    stages = [predict(MODEL, H100, layout, replace(TRAINING, zero_stage=z)) for z in range(4)]
    sizes = [one.memory_gib for one in stages]
    assert sizes == sorted(sizes, reverse=True)
    moved = predict(MODEL, H100, layout, replace(TRAINING, zero_stage=1, offload=True))
    assert moved.memory_parts["optimizer"] == 0.0
    assert moved.parts["optimizer"] > stages[1].parts["optimizer"]


def test_whole_logits_need_memory_on_every_tensor_rank() -> None:
    eager = replace(NATIVE, logits_rows=None)
    gathered = replace(eager, gathers_logits=True)
    layout = Layout(dp_shard=8, tp=8)
    split, whole = (predict(MODEL, H100, layout, TRAINING, one) for one in (eager, gathered))
    # 10 bytes of each logit; gathered, those of all ranks, and 16-bit copies: parts to join, own
    # columns, the gradient.
    copies = 2 * (2 + 1 / 8) / 10
    assert whole.memory_parts["logits"] == pytest.approx(
        8 * (1 + copies) * split.memory_parts["logits"]
    )
    assert whole.step_time_s > split.step_time_s


def test_a_host_that_starts_nothing_ahead_adds_its_time_to_every_micro_batch() -> None:
    few, many = (Layout(dp_shard=8, micro_sequences=m, recompute="full") for m in (8, 1))
    on_cores = replace(NATIVE, ahead=False)
    for layout, micro_batches in ((few, 8), (many, 64)):
        ahead, added = (predict(MODEL, H100, layout, TRAINING, one) for one in (NATIVE, on_cores))
        assert ahead.parts["host"] == 0.0  # a block takes longer than its kernels' start
        passes = NATIVE.shared_host * (1.0 + 1.6 + 1.0)  # forward, backward, forward again
        expected = micro_batches * MODEL.n_layers * passes * Constants().host_us * 1e-6
        assert added.parts["host"] == pytest.approx(expected)


def test_hosts_start_blocks_slower_that_several_ranks_hold_and_slowest_divided_tensors() -> None:
    on_cores = replace(NATIVE, ahead=False)
    alone, shared, divided = (
        predict(MODEL, H100, layout, Training(64, 4096), on_cores)
        for layout in (
            Layout(pp=8, stage_layers=(4,) * 8),
            Layout(dp_shard=8),
            Layout(tp=8),
        )
    )
    per_block = Constants().host_us * 1e-6 * 2.6 * MODEL.n_layers
    assert alone.parts["host"] == pytest.approx(64 * per_block / 8)
    assert shared.parts["host"] == pytest.approx(8 * NATIVE.shared_host * per_block)
    assert divided.parts["host"] == pytest.approx(64 * NATIVE.tensor_host * per_block)


def test_a_device_that_no_run_calibrated_is_told_and_has_a_wider_interval() -> None:
    layout = Layout(dp_shard=8, recompute="full")
    b200 = predict(MODEL, homogeneous("b200", 1), layout, TRAINING)
    h100 = predict(MODEL, homogeneous("h100", 1), layout, TRAINING)
    assert any("no run on b200" in word for word in b200.trust)
    assert not any("no run" in word for word in h100.trust)
    widths = [one.interval_s[1] / one.interval_s[0] for one in (b200, h100)]
    assert widths[0] > widths[1]


def test_more_devices_than_any_run_had_are_told_and_widen_the_interval() -> None:
    layout = Layout(dp_shard=64, recompute="full")
    near, far = (
        predict(MODEL, H100, layout, TRAINING, constants={"h100": Constants(most_devices=n)})
        for n in (64, 8)
    )
    assert near.trust == ()
    assert any("runs on at most 8 devices" in word for word in far.trust)
    assert far.interval_s[1] / far.interval_s[0] > 1.05 * near.interval_s[1] / near.interval_s[0]


def test_what_hardly_fits_is_told() -> None:
    found = predict(MODEL, homogeneous("h100", 1), Layout(dp_shard=8, recompute="full"), TRAINING)
    constants = Constants(reserved_gib=found.capacity_gib - found.memory_gib)
    tight = predict(
        MODEL,
        homogeneous("h100", 1),
        Layout(dp_shard=8, recompute="full"),
        TRAINING,
        constants={"h100": constants},
    )
    assert tight.fits
    assert any("may or may not fit" in word for word in tight.trust)


def test_too_few_devices_are_an_error() -> None:
    with pytest.raises(ClusterError, match=r"65 ranks.*64 devices"):
        told(Layout(dp_shard=65))


def test_a_predictor_that_has_seen_much_says_what_a_new_one_says() -> None:
    layouts = [
        Layout(
            dp_shard=64 // (tp * pp),
            tp=tp,
            pp=pp,
            virtual_stages=v,
            schedule=s,
            micro_sequences=m,
            recompute=r,
        )
        for tp in (1, 4)
        for pp, v, s in (
            (1, 1, "1f1b"),
            (2, 1, "gpipe"),
            (4, 1, "1f1b"),
            (4, 2, "interleaved_1f1b"),
            (4, 2, "zbv_zero_bubble"),
        )
        for m in (1, 2)
        for r in ("none", "full")
    ]
    seasoned = Predictor(MODEL, H100, TRAINING)
    for _ in range(2):
        for layout in layouts:
            assert seasoned.predict(layout) == told(layout)


@pytest.mark.parametrize(
    ("size", "layout", "bytes_each"),
    [
        ("1b", Layout(), 4.0),
        ("1b", Layout(dp_replicate=8), 4.0),
        ("1b", Layout(dp_shard=8), 4 / 8),  # gathered unit by unit, as the model's own weights
        ("60m", Layout(dp_shard=8), 4 / 8 + 2),  # gathered once a step
    ],
)
def test_a_kept_teacher_is_a_second_set_of_weights(
    size: str, layout: Layout, bytes_each: float
) -> None:
    model = preset(size, 32_000)
    plain = predict(model, H100, layout, TRAINING)
    found = predict(model, H100, layout, replace(TRAINING, teacher=True))
    expected = parameters(model) / 2**30 * bytes_each
    assert found.memory_parts["teacher"] == pytest.approx(expected, rel=0.01)
    assert found.memory_gib == pytest.approx(plain.memory_gib + found.memory_parts["teacher"])
    assert found.step_time_s == plain.step_time_s
