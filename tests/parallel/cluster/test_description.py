from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from motet.parallel.cluster.description import Cluster, ClusterError, Link, device, homogeneous
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES
from motet.parallel.cluster.file import from_mapping, read

TWO_SITES = """
groups:
  - name: hall
    device: h100
    nodes: 2
    devices_per_node: 8
    nics: {count: 8, gbit_s: 400, kind: infiniband}
  - name: attic
    device: {kind: mine, like: a100-40, memory_gib: 30, price_per_hour: 1.5}
    nodes: 3
    devices_per_node: 4
    intra_node: {gb_s: 25, latency_us: 6, kind: pcie}
    nics: {count: 2, gb_s: 12.5, kind: roce}
links:
  - {between: [hall, attic], gbit_s: 10, latency_us: 5000, kind: ethernet}
"""


def group(**changes: Any) -> dict[str, Any]:
    return {
        "groups": [
            {
                "device": "h100",
                "nodes": 2,
                "devices_per_node": 8,
                "nics": {"count": 8, "gbit_s": 400, "kind": "infiniband"},
                **changes,
            }
        ]
    }


def test_a_file_is_read_in_bytes_per_second_and_device(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(TWO_SITES)
    cluster = read(path)
    hall, attic = cluster.groups
    assert cluster.devices == 16 + 12
    assert hall.inter_node == Link(50.0, 3.0, "infiniband")
    assert attic.inter_node.gb_s == 2 * 12.5 / 4
    assert hall.intra_node.gb_s == 450.0  # what an H100 has, where the file says nothing
    assert attic.device.memory_gib == 30
    assert attic.device.peak("bf16") == 312.0
    assert cluster.link(1, 0).gb_s == 1.25
    assert cluster.price_per_hour == 16 * hall.device.price_per_hour + 12 * 1.5
    assert [cluster.spot(d) for d in (0, 7, 8, 16, 27)] == [(0, 0), (0, 0), (0, 1), (1, 2), (1, 4)]


@pytest.mark.parametrize("kind", DEVICES)
def test_a_cluster_survives_being_written_and_read(kind: str) -> None:
    import yaml

    cluster = homogeneous(kind, 3, 4)
    assert from_mapping(yaml.safe_load(cluster.to_yaml())) == cluster


def test_two_sites_survive_being_written_and_read(tmp_path: Path) -> None:
    import yaml

    cluster = from_mapping(yaml.safe_load(TWO_SITES))
    (tmp_path / "again.yaml").write_text(cluster.to_yaml())
    assert read(tmp_path / "again.yaml") == cluster


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (group(nics={"count": 8, "gb_s": 400}), ["400 GB/s", "gbit_s: 400", "gb_s: 50"]),
        (
            group(nics={"count": 8, "gbit_s": 50, "kind": "infiniband"}),
            ["50 Gbit/s is no rate of InfiniBand", "gb_s: 50"],
        ),
        (
            group(nics={"count": 8, "gb_s": 100, "kind": "infiniband"}),
            ["nics"],
        ),
        (group(intra_node={"gb_s": 900, "kind": "nvlink"}), ["data sheets count both", "450"]),
        (group(nics={"count": 8, "gb_s": 50, "gbit_s": 400}), ["one of gb_s (bytes) and gbit_s"]),
        (group(device="h10"), ["did you mean 'h100'", "memory_gib: 24", "like: a100-80"]),
        (group(device={"kind": "x", "memory_gib": 3}), ["'x' is not in the catalogue"]),
        (group(nodes=0), ["groups[0].nodes", "1 to 1,000,000"]),
        (group(nodes=2.5), ["groups[0].nodes", "2.5"]),
        (group(nics=None), ["groups[0].nics"]),
        (group(nodez=3), ["did you mean 'nodes'"]),
        (
            group(device={"kind": "h100", "measured_tflops": {"bf16": 1200}}),
            ["more than the peak of 989.4"],
        ),
        (group(device={"kind": "h100", "memory_gib": -1}), ["-1 is not a number from 0.5"]),
        ({"groups": []}, ["is not a list of at least one group"]),
        (None, ["is not a mapping"]),
    ],
)
def test_what_cannot_be_meant_is_told_with_what_would_work(values: Any, words: list[str]) -> None:
    if words == ["nics"]:  # 800 Gbit/s cards exist
        assert from_mapping(values).groups[0].inter_node.gb_s == 100.0
        return
    with pytest.raises(ClusterError) as caught:
        from_mapping(values)
    for word in words:
        assert word in str(caught.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(ClusterError) as caught:
        from_mapping(group(device="h10", nodes=-1, devices_per_node=0))
    assert str(caught.value).count(";") >= 2


def test_the_example_of_the_page_is_a_cluster() -> None:
    import yaml

    page = (Path(__file__).parents[3] / "docs" / "planning.md").read_text(encoding="utf-8")
    example = page.split("```text\n", 1)[1].split("```", 1)[0]
    assert from_mapping(yaml.safe_load(example)).devices == 4 * 8 + 2 * 4


def test_groups_need_a_link_between_them() -> None:
    two = {"groups": [group(name="a")["groups"][0], group(name="b")["groups"][0]]}
    with pytest.raises(ClusterError, match=r"say nothing of a and b.*between: \[a, b\]"):
        from_mapping(two)


def test_a_file_that_is_no_yaml_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text("groups: [")
    with pytest.raises(ClusterError, match="is not YAML"):
        read(path)
    with pytest.raises(ClusterError, match="No such file"):
        read(tmp_path / "none.yaml")


def test_every_device_of_the_catalogue_has_a_source_and_a_link() -> None:
    assert set(DEVICES) == set(DEFAULT_LINKS)
    assert all(values["source"] for values in DEVICES.values())
    assert device("v100-16").peak("bf16") == 125.0  # fp16 stands in


def test_a_device_without_any_rate_says_which_setting_is_missing() -> None:
    with pytest.raises(ClusterError, match=r"peak_tflops\.bf16"):
        device("h100", peak_tflops={}).peak("bf16")


def test_a_device_beyond_the_cluster_is_an_error() -> None:
    cluster: Cluster = homogeneous("h100", 1)
    with pytest.raises(ClusterError, match="8 devices"):
        cluster.spot(8)
