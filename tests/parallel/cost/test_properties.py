"""What holds of every prediction, whatever the layout, the machines and the training."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from motet.models.config import ModelConfig, problems
from motet.parallel.cluster.description import Cluster, Group, Link, device, homogeneous
from motet.parallel.cluster.devices import DEVICES
from motet.parallel.cost.stages import NATIVE, Prediction, Training, Traits, predict
from motet.parallel.layout.layout import SCHEDULES, Layout
from motet.parallel.layout.rules import problems as layout_problems

Case = tuple[ModelConfig, Cluster, Layout, Training, Traits]
DEGREES = st.sampled_from((1, 2, 4))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """A sound model, cluster, layout and training, of any kind."""
    pp = draw(DEGREES)
    heads = draw(st.sampled_from((8, 16)))
    experts = draw(st.sampled_from((0, 0, 8)))
    model = ModelConfig(
        draw(st.sampled_from((1024, 128_256))),
        128 * heads,
        draw(st.sampled_from((8, 12))),
        heads,
        draw(st.sampled_from((4, heads))),
        draw(st.sampled_from((512, 4096))),
        n_experts=experts,
        tied_embeddings=pp == 1 and draw(st.booleans()),
    )
    schedule = draw(st.sampled_from(SCHEDULES)) if pp > 1 else "1f1b"
    shard, tp, cp = draw(DEGREES), draw(DEGREES), draw(DEGREES)
    layout = Layout(
        dp_replicate=draw(DEGREES),
        dp_shard=shard,
        tp=tp,
        cp=cp,
        pp=pp,
        ep=min(draw(DEGREES), shard * tp * cp) if experts else 1,
        virtual_stages=2 if "interleaved" in schedule or schedule == "zbv_zero_bubble" else 1,
        schedule=schedule,
        micro_sequences=draw(st.sampled_from((1, 3))),
        recompute=draw(st.sampled_from(("none", "selective", "full"))),
        sequence_parallel=bool(experts) or draw(st.booleans()),
    )
    kind = draw(st.sampled_from(sorted(DEVICES)))
    cluster = homogeneous(kind, -(-layout.world_size // 8), 8, draw(st.sampled_from((1.0, 400.0))))
    if draw(st.booleans()) and layout.world_size > 8:
        cluster = _two_groups(cluster)
    sequences = layout.dp_replicate * layout.dp_shard * layout.micro_sequences
    training = Training(
        sequences * pp * draw(st.integers(1, 4)),
        2048,
        draw(st.sampled_from(sorted(device(kind).peak_tflops))),
        zero_stage=draw(st.sampled_from((None, 0, 1, 2, 3))),
        probe_tokens=draw(st.sampled_from((0.0, 1e4))),
    )
    traits = replace(
        NATIVE,
        attention=draw(st.sampled_from(("flash1", "flash3", "fused", "math"))),
        ahead=draw(st.booleans()),
        context_gathers=draw(st.booleans()),
        send_overlap=draw(st.sampled_from((0.0, 0.5, 1.0))),
        data_overlap=draw(st.sampled_from((0.0, 0.9))),
    )
    assume(not problems(model))
    assume(not layout_problems(layout, model, 2048, [training.sequences], None))
    return model, cluster, layout, training, traits


def _two_groups(cluster: Cluster) -> Cluster:
    group = cluster.groups[0]
    near, far = replace(group, name="a", nodes=1), replace(group, name="b", nodes=group.nodes - 1)
    return Cluster((near, far), {("a", "b"): Link(0.1, 500.0, "ethernet")})


def told(case: Case) -> Prediction:
    return predict(*case)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_every_number_is_finite_and_the_parts_are_the_whole(case: Case) -> None:
    found = told(case)
    low, high = found.interval_s
    numbers = [found.memory_gib, found.mfu, found.tokens_per_s, found.price]
    numbers += [*found.parts.values(), *found.memory_parts.values(), *found.stage_time_s]
    assert all(math.isfinite(number) and number >= 0 for number in numbers)
    assert 0 < low < found.step_time_s < high < math.inf
    assert math.isclose(sum(found.parts.values()), found.step_time_s, rel_tol=1e-9)
    assert math.isclose(sum(found.memory_parts.values()), found.memory_gib, rel_tol=1e-9)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_more_sequences_take_longer(case: Case) -> None:
    model, cluster, layout, training, traits = case
    more = replace(training, sequences=2 * training.sequences)
    assert told((model, cluster, layout, more, traits)).step_time_s > told(case).step_time_s


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from(("inside", "outside", "between")))
def test_no_faster_link_makes_a_step_slower(case: Case, where: str) -> None:
    model, cluster, layout, training, traits = case
    faster = Cluster(
        tuple(_faster(group, where) for group in cluster.groups),
        {
            key: replace(link, gb_s=4 * link.gb_s) if where == "between" else link
            for key, link in cluster.links.items()
        },
    )
    found = told((model, faster, layout, training, traits)).step_time_s
    assert found <= told(case).step_time_s * (1 + 1e-9)


def _faster(group: Group, where: str) -> Group:
    if where == "inside":
        return replace(group, intra_node=replace(group.intra_node, gb_s=4 * group.intra_node.gb_s))
    if where == "outside":
        return replace(group, inter_node=replace(group.inter_node, gb_s=4 * group.inter_node.gb_s))
    return group


@settings(max_examples=100, deadline=None)
@given(cases())
def test_more_memory_changes_no_time_and_lets_no_layout_fall_out(case: Case) -> None:
    model, cluster, layout, training, traits = case
    groups = tuple(
        replace(group, device=replace(group.device, memory_gib=2 * group.device.memory_gib))
        for group in cluster.groups
    )
    small = told(case)
    large = told((model, Cluster(groups, cluster.links), layout, training, traits))
    assert large.fits >= small.fits
    assert large.memory_gib == small.memory_gib
    assert large.step_time_s == small.step_time_s
