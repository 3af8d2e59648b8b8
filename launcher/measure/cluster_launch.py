"""Starting `motet cluster probe`: its command as text, who this machine is among others, torchrun
and what it hands back. No torch.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from motet.core.cache import cache_folder
from motet.core.errors import UserError
from motet.core.files import read_json, write_json
from motet.core.hostlist import expand
from motet.core.processes import die_with_parent
from motet.launcher.jobs.place import place_of
from motet.launcher.jobs.schedulers import SCHEDULERS
from motet.launcher.launch.alone import found_here
from motet.launcher.launch.command import (
    ONE_NODE,
    NodePlace,
    launcher_words,
    meeting_place,
    rendezvous_arguments,
    without_launches,
)
from motet.launcher.launch.joining import fresh_meeting
from motet.launcher.measure.cluster_worker import TOLD

FIRST_PORT = 30_600
"""Ports of which a job's id chooses the one where its nodes meet: not those of runs."""
KEPT_LINES = 4
ENDS_WITHIN_S = 10.0


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        processes: on this machine.
        groups: hosts by group; None: found by measuring.
        series_s: seconds of one series of transfers.
        timeout_s: how long ranks and machines wait for a silent one.
    """

    processes: int
    device: str = "auto"
    groups: Mapping[str, Sequence[str]] | None = None
    series_s: float = 1.5
    timeout_s: float = 300.0

    def plain(self) -> dict[str, Any]:
        """Return what ranks read."""
        groups = {name: list(hosts) for name, hosts in (self.groups or {}).items()} or None
        return {
            "device": self.device,
            "groups": groups,
            "series_s": self.series_s,
            "timeout_s": self.timeout_s,
        }


def read_groups(words: Sequence[str]) -> dict[str, list[str]] | None:
    """Return hosts by group of words such as "ib:n[1-2]" or "eth:n3,n4"; None without any.

    Raises:
        UserError: a word is something else.
    """
    out: dict[str, list[str]] = {}
    for word in words:
        name, colon, hosts = word.partition(":")
        if not colon or not name or not hosts or name in out:
            why = "is given twice" if name in out else "is not NAME:HOST,HOST"
            raise UserError(f"--groups: {word!r} {why}; such as --groups ib:n1,n2 eth:n[3-4]")
        out[name] = expand(hosts)
    return out or None


def in_job(environment: Mapping[str, str]) -> NodePlace | None:
    """Return who this machine is where one process was started on each node of a job, by any
    scheduler; None outside of a job of several nodes.

    Raises:
        SchedulerError: a job of several nodes, but not one process on each.
    """
    for kind in SCHEDULERS.values():
        here = kind().probed_node(environment)
        if here is not None:
            sizes = [1] * len(here.hosts)  # processes are counted by the ranks themselves
            place = place_of(here, sizes, FIRST_PORT)[1]
            return NodePlace(place.count, place.rank, place.endpoint)
    return None


def command(asked: Asked, nodes: NodePlace, asked_file: str, result_file: str) -> list[str]:
    """Return torchrun's arguments on this machine."""
    return [
        *launcher_words(nodes, "torch.distributed.run"),
        *rendezvous_arguments(nodes, "motet-cluster-probe"),
        "--nproc-per-node",
        str(asked.processes),
        "-m",
        "motet.launcher.measure.cluster_worker",
        asked_file,
        result_file,
    ]


def environment(
    asked: Asked, nodes: NodePlace, inherited: Mapping[str, str], cores: int
) -> dict[str, str]:
    """Return the environment of the ranks: each has its share of the cores unless the user says
    otherwise.
    """
    out = {**without_launches(inherited), "PYTHONSAFEPATH": "1"}
    out |= meeting_place(nodes, out)
    out.setdefault("OMP_NUM_THREADS", str(max(1, cores // asked.processes)))
    return out


def run(
    asked: Asked,
    nodes: NodePlace = ONE_NODE,
    tell: Callable[[str], None] = print,
    cores: int = 1,
    meet: Path | None = None,
) -> dict[str, Any]:
    """Measure; returns what `probe_survey.survey` gives.

    Args:
        meet: folder that all machines see; None: the user's own.
        tell: takes a line on what is measured now.

    Raises:
        UserError: there is no result; the message says why.
    """
    with tempfile.TemporaryDirectory(prefix="motet-probe-") as folder:
        asked_file, result_file = Path(folder, "asked.json"), Path(folder, "result.json")
        write_json(asked_file, asked.plain())
        meeting = Path(folder)
        if nodes.count > 1:
            meeting = fresh_meeting(meet or cache_folder("meetings"), nodes, asked.timeout_s)
        with found_here(nodes, meeting) as place:
            words = command(asked, place, str(asked_file), str(result_file))
            code, last = _watched(words, environment(asked, place, os.environ, cores), tell)
        found = read_json(result_file) if result_file.exists() else {}
        if "error" in found:
            raise UserError(found["error"])
        if code or not found:
            raise UserError(_failure(code, nodes, last))
        return dict(found)


def _failure(code: int, nodes: NodePlace, last: Sequence[str]) -> str:
    hint = ""
    if nodes.count > 1:
        hint = f"; all {nodes.count} machines must run this command and reach {nodes.host}"
    shown = "".join(f"\n  {line}" for line in last)
    return (
        f"the probe ended with exit code {code} and without a result{hint}; its last words:{shown}"
    )


def _watched(
    words: Sequence[str], variables: Mapping[str, str], tell: Callable[[str], None]
) -> tuple[int, list[str]]:
    """Run torchrun to its end; returns its exit code and the last lines that it and its ranks
    printed.
    """
    last: deque[str] = deque(maxlen=KEPT_LINES)
    process = subprocess.Popen(
        list(words),
        env=dict(variables),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(signal.SIGTERM),
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            if line.startswith(TOLD):
                tell(line.removeprefix(TOLD).strip())
            elif line.strip() and not line.startswith(" "):  # frames of a traceback say little
                last.append(line.rstrip()[:300])
        return process.wait(), list(last)
    finally:
        _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """Leave no process behind: torchrun ends its ranks when it is asked to, and they die with it
    when it is killed.
    """
    if process.poll() is not None:
        return
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(ENDS_WITHIN_S)
    if process.poll() is None:
        process.kill()
        process.wait()
