"""A scheduler of one's own: jobs are processes of this machine, in the folder $LOCAL_QUEUE.

A process for each job starts its script, starts it again when it is requeued or killed, and notes
what became of it. `scheduler: local_queue.py:LocalQueue` uses it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from motet.core.jobs import CurrentJob, JobNode, JobRecord, JobState, NodeGroup, SchedulerError
from motet.launcher.config.sections import RunSettings
from motet.launcher.jobs.scheduler import JobCommands, JobRequest, Scheduler

JOB, RESTARTS = "LOCAL_JOB", "LOCAL_RESTARTS"


class LocalQueue(Scheduler):
    """One job at a time would be a queue; this one starts them all."""

    recorded = ("LOCAL_",)

    @property
    def folder(self) -> Path:
        return Path(os.environ["LOCAL_QUEUE"])

    def request(self, settings: RunSettings) -> JobRequest:
        limit = settings.scheduler_options.get("max_requeues", 20)
        group = NodeGroup(processes=settings.layout.processes)
        return JobRequest((group,), max_requeues=int(limit))

    def script(self, settings: RunSettings, root: str, commands: JobCommands) -> str:
        words = shlex.join([*commands.python, "-m", commands.whole, root])
        path = shlex.quote(f"{root}/code")
        return f"export PYTHONPATH={path}:$PYTHONPATH PYTHONSAFEPATH=1\nexec {words}\n"

    def submit(self, script: Path, dependency: str = "") -> str:
        job_id = str(len(list(self.folder.glob("*.json"))) + 1)
        write(self.folder, job_id, state="pending", script=str(script), restarts=0, pid=0)
        nothing = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        words = [sys.executable, __file__, str(self.folder), job_id]
        subprocess.Popen(words, start_new_session=True, **nothing)
        return job_id

    def query(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        known = {path.stem: read(self.folder, path.stem) for path in self.folder.glob("*.json")}
        return {
            id_: JobRecord(id_, "job", JobState(job["state"]), restarts=job["restarts"])
            for id_, job in known.items()
            if not ids or id_ in ids
        }

    def cancel(self, ids: Sequence[str]) -> None:
        for id_ in ids:
            (self.folder / f"{id_}.cancel").touch()

    def requeue(self, job_id: str) -> None:
        (self.folder / f"{job_id}.requeue").touch()

    def signal(self, ids: Sequence[str], name: str) -> None:
        for id_ in ids:
            if not (pid := read(self.folder, id_)["pid"]):
                raise SchedulerError(f"job {id_} does not run")
            os.killpg(pid, signal.Signals[f"SIG{name}"])

    def current_job(self, environment: Mapping[str, str]) -> CurrentJob | None:
        if JOB not in environment:
            return None
        return CurrentJob(environment[JOB], int(environment[RESTARTS]))

    def this_node(self, environment: Mapping[str, str]) -> JobNode:
        return JobNode(environment[JOB], ((socket.gethostname(),),), 0)


def read(folder: Path, job_id: str) -> Any:
    return json.loads((folder / f"{job_id}.json").read_text())


def write(folder: Path, job_id: str, **facts: Any) -> None:
    whole = folder / f"{job_id}.new"
    whole.write_text(json.dumps(facts))
    whole.rename(folder / f"{job_id}.json")


def supervise(folder: Path, job_id: str) -> None:
    """Run a job until it has ended for good."""
    script, restarts = Path(read(folder, job_id)["script"]), 0
    asked = {name: folder / f"{job_id}.{name}" for name in ("cancel", "requeue")}
    while True:
        variables = {**os.environ, JOB: job_id, RESTARTS: str(restarts)}
        with (script.parent / f"output-{job_id}.txt").open("a") as out:
            process = subprocess.Popen(
                ["bash", str(script)], stdout=out, stderr=out, env=variables, start_new_session=True
            )
        facts = {"script": str(script), "restarts": restarts, "pid": process.pid}
        write(folder, job_id, state="running", **facts)
        while process.poll() is None and not any(path.exists() for path in asked.values()):
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        killed = process.wait() == -signal.SIGKILL
        if asked["cancel"].exists() or not killed:  # a job that was killed lost its machine
            break
        asked["requeue"].unlink(missing_ok=True)
        restarts += 1
    ended = "succeeded" if process.returncode == 0 else "failed"
    ended = "cancelled" if asked["cancel"].exists() else ended
    write(folder, job_id, state=ended, **{**facts, "pid": 0})


if __name__ == "__main__":
    supervise(Path(sys.argv[1]), sys.argv[2])
