"""From timed transfers to bandwidth, latency and groups, on links whose truth is known."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import pytest

from motet.parallel.cluster.description import Cluster, ClusterError
from motet.parallel.cluster.file import from_mapping
from motet.parallel.cluster.probe.fit import (
    MIB,
    SIZES,
    LinkFit,
    Sample,
    check_groups,
    climb,
    fit,
    rounds,
    together,
)
from motet.parallel.cluster.probe.result import cluster_of, device_kind


def shaped(
    gb_s: float, latency_us: float, burst: int = 0, noise: float = 0.0, flows: int = 1
) -> Callable[[int], Sequence[float]]:
    """A link that `flows` equal flows share, with a token bucket of `burst` bytes; other work slows
    single transfers down.
    """
    luck = random.Random(7)

    def seconds(size: int) -> Sequence[float]:
        held_up = 1 + (luck.random() * noise)
        waiting = max(0, size * flows - burst)
        return [(2e-6 * latency_us + waiting / (gb_s * 1e9)) * held_up] * flows

    return seconds


@pytest.mark.parametrize("gb_s", [0.00625, 0.025, 0.125, 12.5, 400.0])
@pytest.mark.parametrize("flows", [1, 4])
def test_a_link_is_found_in_spite_of_bursts_and_of_other_work(gb_s: float, flows: int) -> None:
    link = shaped(gb_s, 40.0, burst=64 << 10, noise=0.5, flows=flows)
    found = fit(climb(link, budget_s=3.0))
    assert found.gb_s == pytest.approx(gb_s, rel=0.15)
    assert found.latency_us == pytest.approx(40.0, rel=0.5)


def test_the_burst_of_a_shaped_link_is_not_taken_for_bandwidth() -> None:
    link = shaped(0.01, 20.0, burst=MIB)
    samples = climb(link, budget_s=3.0)
    largest = samples[-1]
    assert largest.size / largest.seconds[0] / 1e9 > 0.011  # what a single transfer would say
    assert fit(samples).gb_s == pytest.approx(0.01, rel=0.02)


def test_what_is_measured_differs_from_the_fit_by_the_noise() -> None:
    quiet = fit(climb(shaped(0.1, 50.0), 2.0))
    noisy = fit(climb(shaped(0.1, 50.0, noise=1.0), 2.0))
    assert quiet.residual < 0.01
    assert 0.1 < noisy.residual < 1.0


@pytest.mark.parametrize("gb_s", [1e-4, 0.00625, 0.125, 50.0])
def test_a_slow_link_is_asked_for_small_sizes_and_a_fast_one_for_all(gb_s: float) -> None:
    link = shaped(gb_s, 100.0)
    samples = climb(link, budget_s=2.0)
    assert sum(max(sample.seconds) for sample in samples) < 2.3
    assert (samples[-1].size == SIZES[-1]) == (gb_s > 1)


def test_a_long_way_does_not_hide_what_a_link_carries() -> None:
    far = shaped(1.0, 50_000.0)
    samples = climb(far, budget_s=1.0)
    assert samples[-1].size >= 16 * MIB
    found = fit(samples)
    assert found.gb_s == pytest.approx(1.0, rel=0.02)
    assert found.latency_us == pytest.approx(50_000, rel=0.02)
    assert sum(max(sample.seconds) for sample in samples) < 5.0


def test_one_flow_of_several_is_fitted_alone() -> None:
    samples = [Sample(size, (size / 1e9, size / 4e9)) for size in SIZES]
    assert fit(samples, 0).gb_s == pytest.approx(1.0)
    assert fit(samples, 1).gb_s == pytest.approx(4.0)
    assert fit(samples).gb_s == pytest.approx(2.0)  # both have arrived when the slower has


def test_times_that_grow_with_nothing_still_give_a_rate() -> None:
    assert fit([Sample(size, (1e-3,)) for size in SIZES]).gb_s == pytest.approx(
        SIZES[-1] / 1e6, rel=0.01
    )
    with pytest.raises(ValueError, match="nothing was measured"):
        fit([])


@pytest.mark.parametrize("hosts", range(2, 12))
def test_every_pair_of_hosts_meets_once_and_no_host_is_in_two_pairs_at_a_time(hosts: int) -> None:
    schedule = rounds(hosts)
    met = [pair for one in schedule for pair in one]
    assert sorted(met) == list(combinations(range(hosts), 2))
    for one in schedule:
        busy = [host for pair in one for host in pair]
        assert len(busy) == len(set(busy))


def links_of(
    sides: Sequence[int], within: Sequence[float], across: float, far_us: float = 30.0
) -> dict[tuple[int, int], LinkFit]:
    """Links of hosts on numbered sides; `within` is the rate inside of each side."""
    out = {}
    for a, b in combinations(range(len(sides)), 2):
        same = sides[a] == sides[b]
        rate = within[sides[a]] if same else across
        out[a, b] = LinkFit(rate, 30.0 if same else far_us, 0.0, MIB, 1)
    return out


def test_hosts_are_grouped_by_their_own_best_links_however_slow_these_are() -> None:
    sides = [0, 1, 0, 1, 1]
    assert together(links_of(sides, [25.0, 1.0], 0.1), 5) == [[0, 2], [1, 3, 4]]
    assert together(links_of([0, 0, 1], [25.0, 0.0], 1.0), 3) == [[0, 1], [2]]


def test_links_of_one_speed_make_one_group() -> None:
    assert together(links_of([0, 1, 0], [10.0, 10.0], 9.0), 3) == [[0, 1, 2]]


def test_a_fast_link_with_a_long_way_is_between_groups() -> None:
    assert together(links_of([0, 0, 1, 1], [10.0, 10.0], 10.0, far_us=20_000), 4) == [
        [0, 1],
        [2, 3],
    ]


def test_groups_that_do_not_match_the_hosts_are_refused_with_all_that_is_wrong() -> None:
    check_groups({"a": ["n1"], "b": ["n2", "n3"]}, ["n1", "n2", "n3"])
    with pytest.raises(ClusterError) as told:
        check_groups({"a": ["n1", "n9"], "b": ["n1", "n2"]}, ["n1", "n2", "n3"])
    for words in ("n1 in more than one group", "n9 given, but no process", "n3 in no group"):
        assert words in str(told.value)


# --- from measurements to a cluster


def device(name: str, **values: Any) -> dict[str, Any]:
    return {
        "host": "h",
        "network": "infiniband",
        "device": name,
        "memory_gib": 79.1,
        "tflops": {"bf16": 640.0, "fp32": 48.0},
        "copy_gb_s": 2900.0,
        **values,
    }


def link(
    scope: str, groups: list[str], gb_s: float, latency_us: float, flows: int
) -> dict[str, Any]:
    return {
        "scope": scope,
        "groups": groups,
        "flows": flows,
        "gb_s": gb_s,
        "latency_us": latency_us,
        "residual": 0.02,
        "per_flow_gb_s": gb_s / flows,
    }


def two_groups() -> dict[str, Any]:
    fast, slow = device("NVIDIA H100 80GB HBM3"), device("Tesla T4", memory_gib=14.6)
    slow |= {"tflops": {"fp16": 25.0, "fp32": 6.0}, "copy_gb_s": 240.0, "network": "ethernet"}
    return {
        "hosts": {"a1": [fast] * 8, "a2": [fast] * 8, "b1": [slow] * 4},
        "groups": {"west": ["a1", "a2"], "attic": ["b1"]},
        "links": [
            link("intra_node", ["west"], 2800.0, 4.0, 8),
            link("inter_node", ["west"], 368.0, 6.0, 8),
            link("intra_node", ["attic"], 24.0, 9.0, 2),
            link("between", ["west", "attic"], 1.2, 6000.0, 4),
            link("between", ["attic", "west"], 0.9, 6000.0, 4),
            link("between_alone", ["west", "attic"], 0.8, 5000.0, 1),
        ],
    }


def test_measurements_become_a_cluster_that_a_file_can_hold() -> None:
    cluster, notes = cluster_of(two_groups())
    west, attic = cluster.groups
    assert (west.device.kind, west.nodes, west.devices_per_node) == ("h100", 2, 8)
    assert west.device.measured_tflops == {"bf16": 640.0, "fp32": 48.0}
    assert (west.inter_node.gb_s, west.inter_node.kind) == (46.0, "infiniband")
    assert west.intra_node.gb_s == 350.0
    assert attic.device.kind == "t4"
    between = cluster.links["attic", "west"]
    assert (between.gb_s, between.latency_us, between.kind) == (0.9, 5000.0, "wan")
    assert between.measured
    assert from_mapping(cluster.to_mapping()) == Cluster(cluster.groups, cluster.links)
    assert any("copies reach 2,900 of 3,350 GB/s" in note for note in notes)


def test_a_link_is_written_as_fast_as_collectives_are_on_it_where_a_pair_is_faster() -> None:
    result = two_groups()
    result["collectives"] = [
        {"kind": kind, "where": where, "bus_gb_s": rate}
        for where, factor in (("west", 1.0), ("a node of west", 9.0), ("all", 0.01))
        for kind, rate in (("all_reduce", 320.0 * factor), ("all_gather", 160.0 * factor))
    ]
    west = cluster_of(result)[0].groups[0]
    assert west.inter_node.gb_s == 240.0 / 8  # a ring leaves a node of 8 devices once
    assert any("reach 65% of what a pair does" in note for note in cluster_of(result)[1])
    for one in result["collectives"]:
        one["bus_gb_s"] *= 2
    assert cluster_of(result)[0].groups[0].inter_node.gb_s == 46.0


def test_flows_in_each_others_way_do_not_make_a_link_slower_than_one_pair_finds_it() -> None:
    result = two_groups()
    result["links"][-1]["gb_s"] = 1.1
    assert cluster_of(result)[0].links["attic", "west"].gb_s == 1.1


def test_a_device_that_no_catalogue_has_is_described_by_what_it_reaches() -> None:
    result = two_groups()
    strange = device("Acme TPU 9", tflops={"bf16": 120.0}, copy_gb_s=800.0)
    result["hosts"]["b1"] = [strange] * 4
    cluster, notes = cluster_of(result)
    found = cluster.groups[1].device
    assert (found.kind, found.peak_tflops) == ("acme-tpu-9", {"bf16": 120.0})
    assert found.memory_gb_s == pytest.approx(1000.0)  # of which the cost model takes 80 %
    assert from_mapping(cluster.to_mapping()).groups[1].device == found
    assert any("stands for the peak" in note for note in notes)


def test_a_slow_device_among_fast_ones_is_told() -> None:
    result = two_groups()
    fast = result["hosts"]["a1"]
    result["hosts"]["a1"] = [*fast[:7], {**fast[0], "tflops": {"bf16": 320.0, "fp32": 48.0}}]
    notes = cluster_of(result)[1]
    assert "west: one device reaches 50% of the median in bf16" in notes


@pytest.mark.parametrize(
    ("name", "memory_gib", "kind"),
    [
        ("NVIDIA H100 80GB HBM3", 79.1, "h100"),
        ("NVIDIA H200", 139.8, "h200"),
        ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 79.2, "a100-80"),
        ("Tesla V100-SXM2-32GB", 31.7, "v100-32"),
        ("NVIDIA GeForce RTX 4090", 23.6, "rtx4090"),
        ("rtx4090", None, "rtx4090"),
        ("a100", None, "a100-40"),
        ("NVIDIA A10", 22.0, "a10"),
        ("NVIDIA A100X", 79.2, None),
        ("Acme 9", 10.0, None),
    ],
)
def test_devices_are_known_by_what_drivers_call_them(
    name: str, memory_gib: float | None, kind: str | None
) -> None:
    assert device_kind(name, memory_gib) == kind
