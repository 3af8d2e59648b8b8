"""What `motet cancel` has to do for a run, decided before anything is done: pure."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from motet.core.errors import UserError
from motet.core.jobs import JobState
from motet.core.processes import command_line
from motet.launcher.follow.facts import Facts
from motet.launcher.follow.overview import View
from motet.launcher.follow.processes import Process, parent_of
from motet.launcher.follow.records import Records
from motet.launcher.jobs.schedulers import title

LAUNCHERS = frozenset(
    {"torchrun", "accelerate", "deepspeed"}
    | {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
)
"""Programs and modules that start ranks, and start them again; a shell that did is left alone."""


@dataclass(frozen=True)
class StopAction:
    """One thing to do.

    Attributes:
        kind: "mark" (the run is not to requeue itself), "end" (jobs, at once), "save" (jobs: save,
            then end), "signal" (processes on this host).
        text: what it does, for people.
        jobs: ids of jobs.
        pids: processes on this host.
        signal: its name without SIG.
    """

    kind: str
    text: str
    jobs: tuple[str, ...] = ()
    pids: tuple[int, ...] = ()
    signal: str = ""

    def fields(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {
            "kind": self.kind,
            "text": self.text,
            "jobs": list(self.jobs),
            "pids": list(self.pids),
            "signal": self.signal,
        }


def actions(view: View, records: Records, at_once: bool, now: float) -> list[StopAction]:
    """Return what ends a run, in order; [] when nothing of it waits or runs.

    Args:
        view: the run.
        records: answers of schedulers.
        at_once: without a checkpoint first.
        now: Unix time.

    Raises:
        UserError: it is trained on another machine, in no job.
    """
    found = _for_jobs(view, records, at_once)
    if not found and view.facts.lives_here():
        return _for_processes(view, at_once)
    elsewhere = None if found else view.facts.seen_elsewhere(now)
    if elsewhere is not None:
        raise UserError(
            f"{view.facts.run.root} is trained on {elsewhere.host}, outside of "
            f"{title(view.facts.scheduler)}; run `motet cancel` there"
        )
    return found


def _for_jobs(view: View, records: Records, at_once: bool) -> list[StopAction]:
    """Mark first, then end what waits, so that nothing takes the place of what runs; the rest saves
    and ends.

    A scheduler may send a signal to every process of a step: SIGUSR1 means a stop to ranks and what
    starts them, and nothing to torchrun.
    """
    if view.facts.finished or not view.facts.jobs:
        return []
    live = records.live(view.facts)
    if not live and not records.no_answer(view.facts):
        return []
    found = [StopAction("mark", "mark the run, so that it does not requeue itself")]
    saves = view.state.name == "running" and not at_once
    trained = tuple(job.id for job in live if job.state is JobState.RUNNING and saves)
    ended = tuple(job.id for job in live if job.id not in trained)
    if ended:
        found.append(StopAction("end", f"end {_named(ended)}", jobs=ended))
    if trained:
        text = f"ask {_named(trained)} to save and end"
        found.append(StopAction("save", text, jobs=trained, signal="USR1"))
    return found


def _named(ids: tuple[str, ...]) -> str:
    return f"job{'s' * (len(ids) > 1)} {', '.join(ids)}"


def _for_processes(view: View, at_once: bool) -> list[StopAction]:
    """Ask one rank: all ranks then save at one step.

    A foreign loop gets Ctrl-C, on every process.
    """
    facts = view.facts
    alive = [process for process in facts.processes if process.lives()]
    if at_once:
        pids = (*_launchers(alive), *(process.pid for process in alive))
        pids = pids or _holder(facts)
        return [StopAction("signal", f"kill {_processes(pids)}", pids=pids, signal="KILL")]
    if facts.guest:
        pids = tuple(_launchers(alive)) or tuple(process.pid for process in alive)
        text = f"interrupt {_processes(pids)}, as Ctrl-C does; your own loop decides what it saves"
        return [StopAction("signal", text, pids=pids, signal="INT")]
    first = next((p for p in alive if p.rank == 0 and _is_ours(p.pid)), None)
    if first is not None:
        text = f"ask rank 0 (process {first.pid}) to save and stop"
        return [StopAction("signal", text, pids=(first.pid,), signal="TERM")]
    pids = _holder(facts)
    return [
        StopAction("signal", f"ask {_processes(pids)}, which starts it, to stop", (), pids, "TERM")
    ]


def _holder(facts: Facts) -> tuple[int, ...]:
    """Return the process that holds the run folder, before there are ranks."""
    if facts.lock_pid is None or not _is_ours(facts.lock_pid):
        raise UserError(
            f"{facts.run.root} is being trained, but the process that does it is not found on this "
            "machine; "
            "stop it with Ctrl-C where it was started"
        )
    return (facts.lock_pid,)


def _processes(pids: tuple[int, ...]) -> str:
    return f"process{'es' * (len(pids) > 1)} {', '.join(map(str, pids))}"


def _launchers(alive: list[Process]) -> list[int]:
    """Return what started the ranks, and would start them again."""
    parents = {parent_of(process.pid) for process in alive}
    return sorted(pid for pid in parents if pid and _starts_ranks(pid))


def _starts_ranks(pid: int) -> bool:
    return any(os.path.basename(argument) in LAUNCHERS for argument in command_line(pid))


def _is_ours(pid: int) -> bool:
    """Return whether Motet's name is in a process's command: its number may belong to another one
    by now.
    """
    return any("motet" in argument for argument in command_line(pid))
