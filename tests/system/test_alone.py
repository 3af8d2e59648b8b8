"""What a launch opens to others, and what of others' reaches it: on one machine nothing; on two, no
more than what ranks talk over, at the address that the run uses.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from motet.core.files import read_json
from motet.core.processes import children
from tests.system.runs import (
    MOTET,
    TIMEOUT_S,
    environment,
    kill_rank,
    losses,
    rows,
    write_yaml,
)

FOREIGN = {
    "PET_NNODES": "2",
    "PET_NODE_RANK": "0",
    "PET_RDZV_BACKEND": "static",
    "MASTER_ADDR": "gpu-node-nobody-knows",
    "MASTER_PORT": "1",
    "RANK": "1",
    "WORLD_SIZE": "2",
    "TORCHELASTIC_RESTART_COUNT": "7",
}


def family_of(pid: int) -> set[int]:
    """A process and all that it started."""
    return {pid, *(one for child in children(pid) for one in family_of(child))}


def listening(pids: Iterable[int]) -> set[str]:
    """Local addresses on which these processes listen, as the kernel writes them."""
    sockets: dict[str, str] = {}
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            words = line.split()
            if words[3] == "0A":  # LISTEN
                sockets[f"socket:[{words[9]}]"] = words[1].rpartition(":")[0]
    held: set[str] = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            try:
                held.add(os.readlink(path))
            except OSError:  # closed meanwhile
                continue
    return {address for name, address in sockets.items() if name in held}


LOOPBACK = {"0100007F", "00000000000000000000000001000000"}
"""127.0.0.1 and ::1 as /proc/net writes them."""


def test_one_machine_trains_under_a_name_that_nobody_knows_and_opens_no_port(
    corpus: Path, tmp_path: Path
) -> None:
    yaml = write_yaml(tmp_path, corpus, "r")
    words = [*MOTET, "train", str(yaml), "training.steps=40", "experiments.list=[]"]
    if os.geteuid() == 0:  # another host name needs a namespace of its own
        name = 'hostname gpu-node-nobody-knows && exec "$@"'
        words = ["unshare", "--uts", "bash", "-c", name, "bash", *words]
    own = tmp_path / "t"
    own.mkdir()
    process = subprocess.Popen(
        words,
        env=environment() | FOREIGN | {"TMPDIR": str(own)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    run, seen, looked = tmp_path / "runs/r", set(), 0
    deadline = time.monotonic() + TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        pids = family_of(process.pid)
        seen |= listening(pids)
        looked += bool(rows(run, "step")) and len(pids) > 2
        time.sleep(0.1)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert looked, "never looked while it trained"
    assert seen <= LOOPBACK
    assert not list(own.glob("motet-*"))


def test_two_machines_open_no_more_than_their_ranks_and_meet_again_after_a_crash(
    corpus: Path, whole_run: Path, tmp_path: Path
) -> None:
    """Both are this one. Another program has the port of the endpoint, which is no matter."""
    yaml, run = write_yaml(tmp_path, corpus, "whole"), tmp_path / "runs/whole"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        words = ["layout.processes=1", "--nnodes", "2", "--endpoint", f"127.0.0.1:{port}"]
        both = [
            subprocess.Popen(
                [*MOTET, "train", str(yaml), *words, "--node-rank", str(rank)],
                env=environment(),
                cwd=tmp_path,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for rank in (0, 1)
        ]
        before: set[str] = set()
        during: set[str] = set()
        killed = False
        deadline = time.monotonic() + TIMEOUT_S
        while any(one.poll() is None for one in both) and time.monotonic() < deadline:
            pids = [pid for one in both for pid in family_of(one.pid)]
            trains = bool(rows(run, "step"))
            (during if trains else before).update(listening(pids))
            if not killed and len(rows(run, "step")) > 9:
                killed = True
                kill_rank(run, 1, signal.SIGKILL)
            time.sleep(0.1)
        outputs = [one.communicate()[0] for one in both]
    assert [one.returncode for one in both] == [0, 0], outputs
    assert during, "ranks listen for each other"
    assert before | during <= LOOPBACK
    ends = [read_json(path)["reason"] for path in sorted(run.glob("attempts/*/attempt.json"))]
    assert ends == ["crashed", "finished"]
    assert losses(run) == losses(whole_run)
    meeting = run / "attempts/1/meeting"
    assert meeting.stat().st_mode & 0o077 == 0
    assert {path.name for path in meeting.glob("round-*")} == {"round-1", "round-2"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_listener_would_have_been_seen() -> None:
    with socket.create_server(("0.0.0.0", 0)):
        assert "00000000" in listening([os.getpid()])
