"""The testbed as it runs: a real Slurm that requeues, preempts, loses nodes, and leaves nothing
behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from motet.slurm.errors import SlurmError
from motet.slurm.testbed import processes
from motet.slurm.testbed.bed import Testbed
from tests.slurm.bed_fixture import (
    job_field,
    remove_orphans,
    slurm,
    submit,
    wait_until,
    wait_until_done,
)

pytestmark = pytest.mark.xdist_group("testbed")

PAGE = Path(__file__).parents[2] / "docs" / "testbed.md"
RECEIVE = """
import socket, sys, time
server = socket.create_server((sys.argv[1], 9000))
print("ready", flush=True)
link, _ = server.accept()
count, start_s = 0, 0.0
while piece := link.recv(1 << 16):
    start_s = start_s or time.perf_counter()
    count += len(piece)
print(count * 8e-6 / (time.perf_counter() - start_s))
"""
SEND = """
import socket, sys
with socket.create_connection((sys.argv[1], 9000), timeout=30) as link:
    link.sendall(bytes(int(sys.argv[2])))
"""


def mbit_per_s(bed: Testbed, source: str, target: str, transfer_bytes: int) -> float:
    """Rate of a TCP transfer from node to node, as the receiver sees it."""
    place = bed.address(target)
    receive = [*bed.enter(target), sys.executable, "-c", RECEIVE, place]
    send = [*bed.enter(source), sys.executable, "-c", SEND, place, str(transfer_bytes)]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, text=True) as receiver:
        assert receiver.stdout is not None
        assert receiver.stdout.readline() == "ready\n"
        subprocess.run(send, check=True, timeout=60)
        return float(receiver.stdout.read())


def running(bed: Testbed, job: str, restarts: int = 0) -> bool:
    state, restarted = (job_field(bed, job, name) for name in ("JobState", "Restarts"))
    return (state, int(restarted)) == ("RUNNING", restarts)


def test_a_job_runs_on_every_node_under_its_name(healed: Testbed) -> None:
    names = slurm(healed, "srun", "--nodes=4", "hostname").split()
    assert sorted(names) == ["n1", "n2", "n3", "n4"]
    (ib,) = set(slurm(healed, "srun", "--constraint=eth", "--ntasks=2", "hostname").split())
    assert ib in ("n3", "n4")


def test_a_job_sees_the_other_nodes_and_the_configuration(healed: Testbed, tmp_path: Path) -> None:
    script = "getent hosts n1 n4; unset SLURM_CONF; srun --export=ALL hostname"
    job = submit(healed, tmp_path, script, "--nodes=2", "--export=NONE")
    wait_until_done(healed, job)
    told = (tmp_path / f"{job}.txt").read_text().split()
    assert told[1::2][:2] == ["n1", "n4"]
    assert len(set(told[4:])) == 2


def test_the_link_between_the_clusters_is_as_fast_as_asked_and_no_other(healed: Testbed) -> None:
    healed.set_rate(80.0)
    across = mbit_per_s(healed, "n1", "n3", 6_000_000)
    back = mbit_per_s(healed, "n4", "n2", 6_000_000)
    inside = mbit_per_s(healed, "n1", "n2", 60_000_000)
    assert 80 * 0.8 < across < 80 * 1.1
    assert 80 * 0.8 < back < 80 * 1.1
    assert inside > 80 * 4


def test_a_requeued_job_starts_again_within_seconds(healed: Testbed, tmp_path: Path) -> None:
    job = submit(healed, tmp_path, "sleep 600")
    wait_until(lambda: running(healed, job), 20, "the job runs")
    slurm(healed, "scontrol", "requeue", job)
    wait_until(lambda: running(healed, job, restarts=1), 30, "it runs again (120 s by default)")


def test_a_preempted_job_is_asked_at_once_and_may_requeue_itself(
    healed: Testbed, tmp_path: Path
) -> None:
    rank = "trap 'scontrol requeue $SLURM_JOB_ID' TERM; while true; do sleep 0.1; done"
    script = f'srun bash -c "{rank}"'
    low = submit(healed, tmp_path, script, "--nodes=4", "--exclusive")
    wait_until(lambda: "bash" in {who.name for who in healed.inhabitants()}, 20, "the first runs")
    start_s = time.monotonic()
    high = submit(healed, tmp_path, "true", "--partition=high", "--nodes=4", "--exclusive")
    wait_until_done(healed, high)
    assert time.monotonic() - start_s < 12, "its ranks had SIGTERM long before the kill (15 s)"
    assert job_field(healed, low, "Restarts") == "1"


def test_a_job_on_a_cut_node_moves_and_its_rest_ends_when_the_node_is_back(
    healed: Testbed, tmp_path: Path
) -> None:
    job = submit(healed, tmp_path, "sleep 600", "--constraint=ib")
    wait_until(lambda: running(healed, job), 20, "the job runs")
    node = job_field(healed, job, "NodeList")
    healed.cut(node)
    wait_until(lambda: running(healed, job, restarts=1), 60, "it runs elsewhere")
    assert job_field(healed, job, "NodeList") != node
    assert healed.node_states()[node] == "down*"
    assert node in {who.host for who in healed.inhabitants()}, "the cut node's processes live on"
    healed.mend(node)
    wait_until(lambda: node not in {w.host for w in healed.inhabitants()}, 20, "its rest ends")
    assert healed.node_states()[node] == "idle"


def test_a_node_that_crashed_has_no_process_and_can_be_mended(
    healed: Testbed, tmp_path: Path
) -> None:
    job = submit(healed, tmp_path, "sleep 600", "--no-requeue")
    wait_until(lambda: running(healed, job), 20, "the job runs")
    node = job_field(healed, job, "NodeList")
    healed.crash(node)
    assert not healed.inhabitants()
    assert node not in healed.pids()
    assert not healed.running
    healed.mend(node)
    assert healed.running
    assert slurm(healed, "srun", f"--nodelist={node}", "hostname") == node


def test_jobs_outlive_their_controller(healed: Testbed, tmp_path: Path) -> None:
    job = submit(healed, tmp_path, "sleep 600")
    wait_until(lambda: "sleep" in {who.name for who in healed.inhabitants()}, 20, "the job runs")
    (worker,) = [who for who in healed.inhabitants() if who.name == "sleep"]
    healed.restart_controller()
    assert running(healed, job)
    healed.crash()
    assert "ctl" not in healed.pids()
    healed.restart_controller()
    assert running(healed, job)
    assert worker in healed.inhabitants(), "and were not started again"


def test_healing_tells_who_outlived_his_job(testbed: Testbed, tmp_path: Path) -> None:
    job = submit(testbed, tmp_path, "setsid --fork sleep 601")
    wait_until_done(testbed, job)
    (stray,) = testbed.inhabitants()
    assert stray.command == "sleep 601"
    assert testbed.heal() == [stray]
    assert testbed.inhabitants() == []


def test_healing_starts_anew_when_the_controller_may_have_forgotten_a_job(
    testbed: Testbed, tmp_path: Path
) -> None:
    submit(testbed, tmp_path, "sleep 604")
    wait_until(lambda: len(testbed.inhabitants()) == 3, 20, "the job runs")
    testbed.stop_controller(kill=True)
    for file in testbed.files.state.glob("job_state*"):
        file.unlink()
    slurmd = testbed.pids()["n1"]
    testbed.heal()
    assert testbed.inhabitants() == []
    assert testbed.pids()["n1"] != slurmd
    assert slurm(testbed, "srun", "--nodes=4", "hostname").count("n") == 4


@pytest.fixture
def second(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    """Another testbed, beside the first, started from the command line."""
    bed = Testbed(tmp_path_factory.mktemp("second"))
    motet("start", "--folder", str(bed.folder))
    yield bed
    bed.stop()


def motet(*words: str, code: int = 0) -> str:
    command = [sys.executable, "-m", "motet.launcher.cli", "slurm", "testbed", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_two_testbeds_do_not_meet_and_the_shell_lines_choose_one(
    second: Testbed, testbed: Testbed
) -> None:
    assert second.address("n1") != testbed.address("n1")
    command = 'eval "$("$0" -m motet.launcher.cli slurm testbed env --folder "$1")"; '
    command += (
        'sbatch --hold --wrap true > /dev/null; squeue --noheader --format=%j; echo "$SLURM_CONF"'
    )
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, str(second.folder)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["wrap", str(second.files.slurm_conf)], done.stderr
    assert slurm(testbed, "squeue", "--noheader") == ""
    status = json.loads(motet("status", "--json", "--folder", str(second.folder)))
    assert status["running"]
    assert {row["state"] for row in status["nodes"]} == {"idle"}


def test_the_commands_of_the_page_do_what_it_says(second: Testbed) -> None:
    block = PAGE.read_text(encoding="utf-8").split("```sh\n")[1].split("```")[0]
    here = 'motet() { "$0" -m motet.launcher.cli "$@" --folder "$FOLDER"; }\nset -e\n'
    done = subprocess.run(
        ["bash", "-c", here + block, sys.executable],
        env={**os.environ, "FOLDER": str(second.folder)},
        cwd=second.folder,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert {"n1", "n2", "n3", "n4"} <= set(done.stdout.split())
    assert "Submitted batch job" in done.stdout
    assert second.leftovers() == []


def test_what_a_crash_leaves_is_removed_by_stop_and_by_the_next_start(
    second: Testbed, testbed: Testbed, tmp_path: Path
) -> None:
    before = testbed.pids()
    submit(second, tmp_path, "setsid --fork sleep 602; sleep 603", "--nodes=1")
    wait_until(lambda: len(second.inhabitants()) == 4, 20, "the job runs")
    for pid in second.pids().values():
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not second.pids(), 10, "the daemons are gone")
    assert any("sleep 602" in thing for thing in second.leftovers())
    motet("start", "--folder", str(second.folder))
    assert second.running
    assert second.inhabitants() == []
    for pid in second.pids().values():
        os.kill(pid, signal.SIGKILL)
    motet("stop", "--folder", str(second.folder))
    assert second.leftovers() == []
    assert second.names.tag not in subprocess.check_output(["ip", "netns"], text=True)
    assert str(second.folder) not in Path("/proc/mounts").read_text()
    assert testbed.pids() == before, "the other one goes on"
    told = motet("cut", "n1", "--folder", str(second.folder), code=2)
    assert "no testbed runs in" in told
    assert "motet slurm testbed start" in motet("env", "--folder", str(second.folder), code=2)


def test_testbeds_of_killed_tests_are_removed_by_the_next_tests(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory
) -> None:
    session = tmp_path_factory.mktemp("x") / "pytest-of-me" / "pytest-3"
    bed = Testbed(session / "bed")
    bed.start()
    (session / ".lock").write_text(str(os.getpid()))
    remove_orphans(session.parent / "pytest-4")
    assert bed.running
    gone = subprocess.Popen(["true"])
    gone.wait()
    (session / ".lock").write_text(str(gone.pid))
    remove_orphans(session.parent / "pytest-4")
    assert bed.leftovers() == []
    assert testbed.running


def test_a_start_that_fails_leaves_nothing_and_tells_the_daemons_words(
    testbed: Testbed, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    bed = Testbed(tmp_path_factory.mktemp("fails"))
    monkeypatch.setattr("motet.slurm.testbed.bed.BIRTH_S", 0.5)
    conf = "motet.slurm.testbed.shape.slurm_conf_text"
    monkeypatch.setattr(conf, lambda files, subnet: "ClusterName=motet\nNonsense=1\n")
    with pytest.raises(SlurmError, match="Nonsense"):
        bed.start()
    assert bed.leftovers() == []


def test_waiting_gives_up_in_time() -> None:
    start_s = time.monotonic()
    assert not processes.wait_for(lambda: False, 0.1)
    assert time.monotonic() - start_s < 1
