"""Processes of network namespaces: start daemons that outlive us, find who lives where, end them.

A process is known by the namespace that it is in, which only what the testbed started can enter; so
what a crash left behind is found without any record, and nothing else is ever ended.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from motet.slurm.errors import SlurmError

NAMESPACES = Path("/run/netns")
COMMAND_TIMEOUT_S = 20
POLL_S = 0.02
KILL_WAIT_S = 10.0


@dataclass(frozen=True)
class Inhabitant:
    """A living process on a host of the testbed."""

    host: str
    pid: int
    name: str  # the kernel's name of the program, 15 characters at most
    command: str  # its words, with blanks between them
    leads: bool  # leads its session, as a daemon that we started does

    def __str__(self) -> str:
        return f"{self.host}: {self.pid} {self.command or self.name}"


def run(command: Sequence[str], environment: Mapping[str, str] | None = None) -> str:
    """Run a command to its end, return what it printed; SlurmError with its words if it fails."""
    try:
        done = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=COMMAND_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{' '.join(command)}: no answer in {COMMAND_TIMEOUT_S} s") from None
    if done.returncode != 0:
        words = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise SlurmError(f"{' '.join(command)}: {words}")
    return done.stdout


def start_daemon(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> None:
    """Start a command in a session of its own, as nobody's child, with its output appended to
    `log`.
    """
    with log.open("ab") as output:
        subprocess.run(
            ["setsid", "--fork", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            check=True,
            timeout=COMMAND_TIMEOUT_S,
        )


def inhabitants(namespaces: Mapping[str, str]) -> list[Inhabitant]:
    """The living processes in namespaces, given as host -> name; one that is gone has none."""
    hosts = {}
    for host, name in namespaces.items():
        with contextlib.suppress(OSError):
            status = (NAMESPACES / name).stat()
            hosts[status.st_dev, status.st_ino] = host
    if not hosts:
        return []
    entries = (entry for entry in Path("/proc").iterdir() if entry.name.isdecimal())
    found = [who for entry in entries if (who := _inhabitant(entry, hosts)) is not None]
    return sorted(found, key=lambda who: who.pid)


def _inhabitant(entry: Path, hosts: Mapping[tuple[int, int], str]) -> Inhabitant | None:
    """The process of a folder of /proc, when it lives on one of the hosts; zombies do not live."""
    try:
        status = (entry / "ns" / "net").stat()
        host = hosts.get((status.st_dev, status.st_ino))
        if host is None:
            return None
        name, _, rest = (
            (entry / "stat").read_text(errors="replace").partition("(")[2].rpartition(")")
        )
        fields = rest.split()  # state, ppid, pgrp, session: proc_pid_stat(5)
        words = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:  # it ended meanwhile
        return None
    pid = int(entry.name)
    if fields[0] in "ZX":
        return None
    return Inhabitant(host, pid, name, words.strip(), int(fields[3]) == pid)


def send(people: Iterable[Inhabitant], number: signal.Signals) -> None:
    """Send a signal to each; those that are gone are passed over."""
    for who in people:
        with contextlib.suppress(ProcessLookupError):
            os.kill(who.pid, number)


def kill_all(find: Callable[[], list[Inhabitant]]) -> None:
    """SIGKILL whoever `find` finds, again until nobody is found (they may fork meanwhile)."""

    def nobody() -> bool:
        people = find()
        send(people, signal.SIGKILL)
        return not people

    if not wait_for(nobody, KILL_WAIT_S):
        left = "; ".join(map(str, find()))
        raise SlurmError(f"processes that do not end after SIGKILL: {left}")


def wait_for(ready: Callable[[], bool], timeout_s: float, poll_s: float = POLL_S) -> bool:
    """Whether `ready()` became true within the time."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        if time.monotonic() > deadline:
            return False
        time.sleep(poll_s)
    return True
