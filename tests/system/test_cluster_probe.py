"""`motet cluster probe` in a Slurm job, over a link whose rate is known."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from motet.parallel.cluster.file import read
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import healed, job_field, submit, testbed, wait_until

__all__ = ["healed", "testbed"]
pytestmark = pytest.mark.xdist_group("testbed")
RATE_MBIT = 200.0
TIMEOUT_S = 200.0


def test_a_probe_in_a_slurm_job_finds_the_two_clusters_and_what_their_link_carries(
    healed: Testbed, tmp_path: Path
) -> None:
    healed.set_rate(RATE_MBIT)
    output = tmp_path / "cluster.yaml"
    words = [sys.executable, "-m", "motet.launcher.cli", "cluster", "probe", "--device", "cpu"]
    words += ["--seconds", "1", "--wait", "90", "--output", str(output)]
    lines = f"export OMP_NUM_THREADS=1\nsrun --ntasks-per-node=1 {shlex.join(words)}"
    job = submit(healed, tmp_path, lines, "--nodes=4", "--ntasks-per-node=1")
    told = tmp_path / f"{job}.txt"
    ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL")
    wait_until(
        lambda: job_field(healed, job, "JobState") in ended, TIMEOUT_S, "the end of the probe"
    )
    assert output.exists(), told.read_text()
    assert "group-1 = n1, n2; group-2 = n3, n4" in output.read_text()
    cluster = read(output)
    assert [(group.nodes, group.devices_per_node) for group in cluster.groups] == [(2, 1), (2, 1)]
    (link,) = cluster.links.values()
    assert link.gb_s * 8e3 == pytest.approx(RATE_MBIT, rel=0.15)
    assert min(group.inter_node.gb_s for group in cluster.groups) > 2 * link.gb_s


def test_a_probe_in_a_job_of_several_nodes_without_srun_says_how_to_start_it(
    healed: Testbed, tmp_path: Path
) -> None:
    words = shlex.join([sys.executable, "-m", "motet.launcher.cli", "cluster", "probe"])
    job = submit(healed, tmp_path, words, "--nodes=2", "--ntasks-per-node=1")
    wait_until(lambda: job_field(healed, job, "JobState") == "FAILED", 60, "the refusal")
    told = (tmp_path / f"{job}.txt").read_text()
    assert told.startswith("motet: this job has 2 nodes; start one process on each: srun --ntasks")
    assert "Traceback" not in told


def test_a_cluster_is_read_from_what_slurm_lists(
    healed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher import cli

    for name, value in healed.environment().items():
        monkeypatch.setenv(name, value)
    output = tmp_path / "cluster.yaml"
    assert cli.main(["cluster", "probe", "--from-slurm", "--output", str(output)]) == 0
    groups = {group.name: group for group in read(output).groups}
    assert {name: group.nodes for name, group in groups.items()} == {"ib": 2, "eth": 2}
    assert groups["ib"].inter_node.kind == "infiniband"
    assert groups["eth"].inter_node.kind == "ethernet"
