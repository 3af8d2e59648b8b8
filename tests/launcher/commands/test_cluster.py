"""`motet cluster probe | show`: what is asked, what is said when it cannot be, what is drawn."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.launcher import cli
from motet.launcher.launch.command import MEETING, NodePlace
from motet.launcher.measure.cluster_launch import (
    Asked,
    command,
    environment,
    in_job,
    read_groups,
)
from motet.launcher.measure.slurm_cluster import cluster_from_slurm, network_of
from motet.launcher.planning import cluster_view
from motet.parallel.cluster import this_machine
from motet.parallel.cluster.description import Cluster, ClusterError, homogeneous
from motet.parallel.cluster.file import from_mapping, read
from motet.slurm.errors import SlurmError
from motet.slurm.inventory import SlurmNode, gpus_of, nodes, parse

TWO = """\
groups:
  - {name: hall, device: h100, nodes: 12, devices_per_node: 8, nics: {count: 8, gbit_s: 400, kind: infiniband}}
  - {name: "attic & <b>", device: t4, nodes: 1, devices_per_node: 4}
links:
  - {between: [hall, "attic & <b>"], gbit_s: 10, latency_us: 5000, kind: wan}
"""
Motet = Callable[..., tuple[int, str, str]]


@pytest.fixture
def motet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Motet:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "two.yaml").write_text(TWO)
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = cli.main(["cluster", *words])
        return code, *capsys.readouterr()

    return call


# --- probe


def test_two_processes_of_this_machine_are_measured_and_the_file_can_be_read(motet: Motet) -> None:
    asked = ["--processes", "2", "--device", "cpu", "--seconds", "0.2"]
    code, out, _ = motet("probe", *asked, "--json")
    assert code == 0
    found = json.loads(out)
    (group,) = read(Path("cluster.yaml")).groups
    assert (group.nodes, group.devices_per_node, group.device.kind) == (1, 2, "cpu")
    assert group.intra_node.measured
    (inside,) = found["links"]
    assert inside["scope"] == "intra_node"
    assert group.intra_node.gb_s == pytest.approx(inside["gb_s"], rel=1e-3)
    assert {one["kind"] for one in found["collectives"]} == {
        "all_reduce",
        "all_gather",
        "all_to_all",
    }
    assert all(one["bus_gb_s"] > 0 for one in found["collectives"])
    before = Path("cluster.yaml").read_text()
    code, _, err = motet("probe", *asked)
    assert code == 2
    assert "cluster.yaml exists; --force replaces it" in err
    assert Path("cluster.yaml").read_text() == before


def test_groups_of_hosts_that_are_not_here_are_refused_by_the_ranks_in_one_message(
    motet: Motet,
) -> None:
    code, _, err = motet("probe", "--device", "cpu", "--groups", "far:n1,n2")
    assert code == 2
    told = [line for line in err.splitlines() if line.startswith("motet: ")]
    assert len(told) == 1
    assert "n1, n2 given, but no process runs there" in told[0]
    assert "Traceback" not in err
    assert not Path("cluster.yaml").exists()


def test_a_dry_run_prints_the_command_and_writes_nothing(motet: Motet) -> None:
    code, out, _ = motet("probe", "--dry-run", "--processes", "3", "--groups", "a:n[1-2]")
    assert code == 0
    assert "--local-addr 127.0.0.1 --nproc-per-node 3" in out
    assert "'groups': {'a': ['n1', 'n2']}" in out
    assert not Path("cluster.yaml").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--processes", "0"], "--processes: 0 is not at least 1"),
        (["--seconds", "nan"], "--seconds: nan is not at least 0.1"),
        (["--groups", "a"], "'a' is not NAME:HOST,HOST"),
        (["--groups", "a:n1", "a:n2"], "'a:n2' is given twice"),
        (["--groups", "a:n[1-"], "n[1-"),
        (["--nnodes", "2", "--endpoint", "n1:29500"], "--nnodes 2 needs --node-rank from 0 to 1"),
        (["--nnodes", "2", "--node-rank", "2"], "needs --node-rank from 0 to 1"),
        (["--nnodes", "2", "--node-rank", "1", "--endpoint", "n1"], "'n1' is not HOST:PORT"),
        (["--node-rank", "1"], "--nnodes is missing"),
    ],
)
def test_nonsense_is_refused_in_one_line(motet: Motet, words: list[str], told: str) -> None:
    code, _, err = motet("probe", "--device", "cpu", "--dry-run", *words)
    assert code == 2
    assert told in err
    assert len(err.splitlines()) == 1


def test_several_machines_meet_in_a_folder_and_share_cores_between_processes() -> None:
    asked = Asked(4, timeout_s=60.0)
    words = command(asked, NodePlace(3, 1, "n1:29500"), "a.json", "r.json")
    assert words[1:3] == [str(MEETING), "torch.distributed.run"]
    assert words[words.index("--rdzv-conf") + 1] == "rank=1"
    place = NodePlace(3, 1, "n1:29500", folder="/shared/x")
    assert environment(asked, place, {}, cores=8)["MOTET_STORE"] == "/shared/x/ranks"
    assert words[-4:] == ["-m", "motet.launcher.measure.cluster_worker", "a.json", "r.json"]
    assert environment(asked, NodePlace(), {}, cores=8)["OMP_NUM_THREADS"] == "2"
    assert (
        environment(asked, NodePlace(), {"OMP_NUM_THREADS": "7"}, cores=8)["OMP_NUM_THREADS"] == "7"
    )


def test_groups_are_read_as_slurm_writes_hosts() -> None:
    found = read_groups(["ib:n[1-2]", "eth:n3,m4"])
    assert found == {"ib": ["n1", "n2"], "eth": ["n3", "m4"]}
    assert read_groups([]) is None


STEP = {
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "n[1-3]",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
}


def test_a_machine_learns_from_slurm_who_it_is() -> None:
    assert in_job({}) is None
    assert in_job({"SLURM_JOB_ID": "1", "SLURM_JOB_NODELIST": "n7"}) is None
    assert in_job(STEP) == NodePlace(3, 2, "n1:30834")


@pytest.mark.parametrize("changed", [{"SLURM_NTASKS": "6"}, {"SLURM_STEP_ID": None}])
def test_a_job_of_several_nodes_must_start_one_process_on_each(
    changed: dict[str, str | None],
) -> None:
    left = {name: value for name, value in {**STEP, **changed}.items() if value is not None}
    with pytest.raises(SlurmError, match="srun --ntasks-per-node=1 motet cluster probe"):
        in_job(left)


# --- from Slurm


LINES = [
    "g1|gpu|64|512000|idle|gpu:h100:8(S:0-1),nvme:1|ndr,h100",
    "g1|all|64|512000|idle|gpu:h100:8(S:0-1),nvme:1|ndr,h100",
    "g2|gpu|64|512000|mixed|gpu:h100:8(S:0-1)|ndr,h100",
    "a1|old|32|256000|idle|gpu:a100:4|eth25,80gb",
    "c1|cpu|48|192000|idle|(null)|(null)",
]


def test_nodes_of_several_partitions_are_one_node() -> None:
    found = parse(LINES)
    assert [node.name for node in found] == ["g1", "g2", "a1", "c1"]
    assert found[0].partitions == ("gpu", "all")
    assert (found[0].gpu_kind, found[0].gpus) == ("h100", 8)
    assert found[3] == SlurmNode("c1", ("cpu",), 48, 192000, "idle", 0, "", ())


@pytest.mark.parametrize(
    ("gres", "found"),
    [
        ("gpu:8", ("", 8)),
        ("gpu", ("", 1)),
        ("gpu:nvidia_a100:2(IDX:0,1),shard:4", ("nvidia_a100", 2)),
        ("gpu:2080ti:8(S:0-1)", ("2080ti", 8)),
        ("gpu:2080:4", ("2080", 4)),
        ("gpu:rtx_a6000:4(S:0,2)", ("rtx_a6000", 4)),
        ("gpu:h100", ("h100", 1)),
        ("gpu:h100:no_consume:8", ("h100", 8)),
        ("gpu(S:0)", ("", 1)),
        ("nvme:1, gpu:l40s:2(IDX:N/A)", ("l40s", 2)),
        ("gpu:a100:2,gpu:a100:2", ("a100", 4)),
        ("gpumem:80G,gpu_util:3", ("", 0)),
        ("craynetwork:4", ("", 0)),
        ("(null)", ("", 0)),
    ],
)
def test_gpus_are_read_from_gres(gres: str, found: tuple[str, int]) -> None:
    assert gpus_of(gres) == found


def test_what_is_no_node_is_refused() -> None:
    with pytest.raises(SlurmError, match="describes no node"):
        parse(["something else"])
    with pytest.raises(SlurmError, match="several kinds"):
        gpus_of("gpu:a100:2,gpu:h100:2")
    for gres in ("gpu:a100_3g.20gb:2", "gpu:1g.5gb:7(S:0)", "gpu:nvidia_a100_1g.10gb:7"):
        with pytest.raises(SlurmError, match="slices of GPUs"):
            gpus_of(gres)
    for gres in ("gpu:a:b:c:2", "gpu::2", "gpu:a100:2)"):
        with pytest.raises(SlurmError, match="no known form"):
            gpus_of(gres)

    class Fake:
        def sinfo(self, fields: str) -> list[str]:
            return LINES

    assert [node.name for node in nodes(Fake(), "gpu")] == ["g1", "g2"]  # type: ignore[arg-type]
    with pytest.raises(SlurmError, match="'ghost' has no nodes; there are gpu, all, old, cpu"):
        nodes(Fake(), "ghost")  # type: ignore[arg-type]


def test_what_slurm_lists_becomes_a_cluster_that_says_what_is_assumed() -> None:
    cluster, notes = cluster_from_slurm(parse(LINES))
    hall, old, cores = cluster.groups
    assert (hall.name, hall.nodes, hall.device.kind) == ("ndr-h100", 2, "h100")
    assert (hall.inter_node.kind, hall.inter_node.gb_s) == ("infiniband", 400 / 8 / 8)
    assert (old.device.kind, old.devices_per_node) == ("a100-80", 4)
    assert (cores.name, cores.device.kind, cores.devices_per_node) == ("cpu", "cpu", 3)
    assert from_mapping(cluster.to_mapping()).groups == cluster.groups
    assert any("ndr-h100 to eth25-80gb: 10 Gbit/s of Ethernet is assumed" in n for n in notes)
    with pytest.raises(UserError, match="'acme' of x1 are not in the catalogue"):
        cluster_from_slurm(parse(["x1|p|8|1000|idle|gpu:acme:2|(null)"]))


def test_nodes_that_cannot_be_counted_on_are_left_out_and_named() -> None:
    odd = [
        "m1|gpu|64|512000|idle|gpu:a100:2,gpu:h100:2|ndr,h100",
        "m2|gpu|64|512000|idle|gpu:a100_3g.20gb:2|ndr,h100",
        *(
            f"d{n}|gpu|64|512000|{state}|gpu:h100:8|ndr,h100"
            for n, state in enumerate(
                ("drained", "draining", "down*", "idle*", "fail", "maint", "DRAINED$")
            )
        ),
        "p1|gpu|64|512000|idle~|gpu:h100:8|ndr,h100",  # asleep: Slurm wakes it
    ]
    cluster, notes = cluster_from_slurm(parse([*LINES, *odd]))
    assert cluster.groups[0].nodes == 3  # g1, g2, p1
    told = "\n".join(notes)
    assert "left out: m1 (GRES 'gpu:a100:2,gpu:h100:2' has GPUs of several kinds" in told
    assert "left out: m2 (GRES 'gpu:a100_3g.20gb:2' has slices" in told
    assert "left out: d0 (Slurm says drained)" in told
    with pytest.raises(SlurmError, match="no node can be used; left out: m1"):
        cluster_from_slurm(parse(odd[:1]))


def test_gpus_without_a_kind_need_one() -> None:
    found = parse(["x1|p|8|1000|idle|gpu:8|(null)"])
    with pytest.raises(UserError, match="--gpu KIND does, one of v100-16"):
        cluster_from_slurm(found)
    (group,) = cluster_from_slurm(found, "h100")[0].groups
    assert (group.device.kind, group.devices_per_node) == ("h100", 8)
    named = parse(["x1|p|8|1000|idle|gpu:8|a100"])
    assert cluster_from_slurm(named, "h100")[0].groups[0].device.kind.startswith("a100")


def test_features_name_networks() -> None:
    assert network_of(["intel", "HDR"]) == ("infiniband", 200.0)
    assert network_of(["roce-100g"]) == ("roce", 100.0)
    assert network_of(["ib"]) == ("infiniband", None)
    assert network_of([]) == ("ethernet", None)


# --- show


def test_a_file_is_drawn_as_text_and_as_pictures_in_which_names_cannot_be_markup(
    motet: Motet,
) -> None:
    code, out, _ = motet("show", "two.yaml", "--svg", "two.svg", "--html", "two.html")
    assert code == 0
    assert "12 nodes x 8 h100" in out
    assert "1.25 GB/s, 5 ms, wan" in out
    assert "100 devices, 387.92 per hour" in out
    picture = ET.parse("two.svg").getroot()
    texts = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "attic & <b>" in texts
    page = Path("two.html").read_text()
    assert "attic &amp; &lt;b&gt;" in page
    assert "<b>" not in page


def test_a_calibrated_group_says_what_its_constants_come_from(motet: Motet) -> None:
    text = TWO.replace(
        "devices_per_node: 4}",
        "devices_per_node: 4, calibration: {constants: {matmul: 0.5}, runs: [a, b], median_error: "
        "0.031, date: '2026-11-21'}}",
    )
    Path("two.yaml").write_text(text)
    code, out, _ = motet("show", "two.yaml", "--html", "page.html")
    assert code == 0
    said = "constants fitted to 2 attempts on 2026-11-21, median error 3.1%: matmul 0.5"
    assert f"attic & <b>: {said}" in out
    page = Path("page.html").read_text()
    assert f"attic &amp; &lt;b&gt;: {said}" in page
    assert re.search("<td[^>]*>10</td>", page)  # Gbit/s, not 10.0
    assert "hall: constants" not in out


def test_json_has_the_cluster_and_its_totals(motet: Motet) -> None:
    code, out, _ = motet("show", "two.yaml", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["devices"] == 100
    assert told["links"][0]["gb_s"] == 1.25
    assert [group["name"] for group in told["groups"]] == ["hall", "attic & <b>"]


def test_groups_that_are_no_neighbours_have_their_links_named_below() -> None:
    one = homogeneous("h100", 1).groups[0]
    groups = [{**homogeneous("h100", 1).to_mapping()["groups"][0], "name": n} for n in "abc"]
    links = [
        {"between": list(ends), "gbit_s": 10, "latency_us": 50, "kind": "ethernet"}
        for ends in ("ab", "bc", "ac")
    ]
    cluster = from_mapping({"groups": groups, "links": links})
    drawn = cluster_view.lines(cluster)
    assert any(line.startswith("  a – c: 1.25 GB/s") for line in drawn)
    assert sum("║  1.25 GB/s" in line for line in drawn) == 2
    assert len({len(line) for line in cluster_view.lines(Cluster((one,)))}) == 1


def test_this_machine_is_shown_without_a_file(
    motet: Motet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(this_machine, "gpus", lambda: [])
    code, out, _ = motet("show", "--json")
    assert code == 0
    (group,) = json.loads(out)["groups"]
    assert group["devices_per_node"] == this_machine.cores()
    monkeypatch.setattr(this_machine, "gpus", lambda: [("NVIDIA H200", 140.4)] * 8)
    code, out, _ = motet("show")
    assert code == 0
    assert "1 node x 8 h200" in out
    monkeypatch.setattr(this_machine, "gpus", lambda: [("Acme 9", 10.0)])
    code, _, err = motet("show")
    assert code == 2
    assert "Acme 9 with 10 GiB is not in the catalogue; measure it: motet cluster probe" in err


def test_the_catalogue_is_listed_with_its_sources(motet: Motet) -> None:
    code, out, _ = motet("show", "--catalogue", "--json")
    assert code == 0
    assert "data sheet" in json.loads(out)["devices"]["h100"]["source"]
    code, out, _ = motet("show", "--catalogue")
    assert code == 0
    assert "rtx4090" in out


@pytest.mark.parametrize(
    ("what", "told"), [("none.yaml", "No such file"), (".", "not the folder of a run")]
)
def test_what_is_no_cluster_is_refused(motet: Motet, what: str, told: str) -> None:
    code, _, err = motet("show", what)
    assert code == 2
    assert told in err


def test_the_driver_lists_gpus_and_cuda_visible_devices_chooses() -> None:
    listing = (
        "0, GPU-aa1, NVIDIA A100, 40960\n1, GPU-bb2, NVIDIA A100, 40960\n2, GPU-cc3, NVIDIA T4, "
        "15360\n"
    )
    assert [name for name, _ in this_machine.visible(listing, None)] == ["NVIDIA A100"] * 2 + [
        "NVIDIA T4"
    ]
    assert this_machine.visible(listing, "2,1") == [("NVIDIA T4", 15.0), ("NVIDIA A100", 40.0)]
    assert this_machine.visible(listing, "GPU-cc") == [("NVIDIA T4", 15.0)]
    assert this_machine.visible(listing, "0,7,1") == [("NVIDIA A100", 40.0)]
    assert this_machine.visible(listing, "") == []
    assert this_machine.visible("No devices were found\n", None) == []
    with pytest.raises(ClusterError, match="not in the catalogue"):
        this_machine.node_of(2, ("Acme 9", 10.0))
