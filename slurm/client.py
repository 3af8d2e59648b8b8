"""Slurm's commands: the only place that starts them.

Commands are argument lists, run in the C locale, with a limit on their time, and only with what
Slurm 20.11 knows already. Variables that would change what they ask or print (`SBATCH_*`,
`SQUEUE_*`, ...) are not passed on.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from motet.core.jobs import JobRecord
from motet.slurm import states
from motet.slurm.errors import SlurmError, SlurmUnreachable

READ_TIMEOUT_S = 15.0
SUBMIT_TIMEOUT_S = 60.0
MOST_IDS = 1000
"""More jobs than this are not listed one by one: all jobs of the user are asked for."""
ID = re.compile(r"\d{1,10}(_\d{1,10})?")

# Field of `squeue --Format` and its width. A value is cut to the width; the one that may hold
# anything is the last.
_QUEUE = {
    "JobArrayID": 40,
    "State": 24,
    "RestartCnt": 12,
    "StartTime": 24,
    "EndTime": 24,
    "Partition": 64,
    "Reason": 96,
    "NodeList": 1024,
    "Name": 256,
}
_HISTORY = ("JobID", "State", "Start", "End", "Partition", "NodeList", "JobName")
_KEPT = ("SLURM_CONF", "SLURM_JWT")
_FOREIGN = ("SLURM_", "SLURMD_", "SBATCH_", "SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_", "SRUN_")
_UNREACHABLE = re.compile(
    r"unable to contact|connection (refused|failure)|communication connection|timed "
    r"out|configuration source"
    r"|socket timed out|slurm_persist_conn|not responding",
    re.IGNORECASE,
)
_NO_RECORD = re.compile(r"invalid job id|accounting storage is disabled", re.IGNORECASE)


class Client:
    """Asks one Slurm installation.

    Args:
        environment: of the commands, which are found on its PATH; None: that of this process.
    """

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        inherited = dict(os.environ if environment is None else environment)
        self.environment = {
            name: value
            for name, value in inherited.items()
            if name in _KEPT or not name.startswith(_FOREIGN)
        } | {"LC_ALL": "C"}

    def available(self) -> bool:
        """Return whether there is a Slurm on the PATH."""
        return all(self._find(command) for command in ("sbatch", "squeue"))

    def version(self) -> tuple[int, int]:
        """Return the version of Slurm, such as (22, 5)."""
        text = self._run(["sbatch", "--version"])
        match = re.search(r"(\d+)\.(\d+)", text)
        if match is None:
            raise SlurmError(f"sbatch --version says {text.strip()!r}, which names no version")
        return int(match[1]), int(match[2])

    def submit(self, script: Path, arguments: Sequence[str] = ()) -> str:
        """Hand a batch script to Slurm and return the id of its job.

        Raises:
            SlurmError: it was refused, in Slurm's words.
        """
        words = self._run(
            ["sbatch", "--parsable", *arguments, str(script)], timeout_s=SUBMIT_TIMEOUT_S
        )
        found = words.strip().splitlines()[-1:] or [""]
        job_id = found[0].partition(";")[0]  # "123;cluster" where there are several
        if not ID.fullmatch(job_id):
            raise SlurmError(f"sbatch says {words.strip()!r}, which is no job id")
        return job_id

    def test_only(self, text: str, arguments: Sequence[str] = ()) -> str:
        """Ask whether and when the job of a script could start; nothing is submitted.

        Returns:
            What Slurm says, in one line.

        Raises:
            SlurmUnreachable: there is no answer.
            SlurmError: such a job would be refused, in Slurm's words.
        """
        command = ["sbatch", "--test-only", *arguments]
        done = self._start(command, SUBMIT_TIMEOUT_S, text)
        if done.returncode != 0:
            raise _error(command, done)
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return said[-1].removeprefix("sbatch: ") if said else ""

    def queue(self, ids: Sequence[str] = ()) -> dict[str, JobRecord]:
        """Return the jobs that Slurm still knows, by id, with one call for all of them.

        Args:
            ids: the jobs that are asked for; none: those of this user.
        """
        fields = ",".join(f"{name}:{width}" for name, width in _QUEUE.items())
        command = ["squeue", "--noheader", "--array", "--states=all", f"--Format={fields}"]
        if ids and len(ids) <= MOST_IDS:
            command.append(f"--jobs={','.join(_checked(ids))}")
        else:
            command.append(f"--user={os.getuid()}")
        return _by_id(map(_queue_record, self._lines(command)), ids)

    def history(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Return the jobs that the accounting knows, by id, with one call; {} where there is no
        accounting.
        """
        if not ids or not self._find("sacct"):
            return {}
        command = [
            "sacct",
            "--noheader",
            "--parsable2",
            "--allocations",
            f"--format={','.join(_HISTORY)}",
            f"--jobs={','.join(_checked(ids))}",
        ]
        return _by_id(map(_history_record, self._lines(command)), ids)

    def sinfo(self, fields: str) -> list[str]:
        """Return one line per node and partition, in these fields of `sinfo --format`."""
        return self._lines(["sinfo", "--noheader", "--Node", f"--format={fields}"])

    def cancel(self, ids: Sequence[str], signal: str | None = None) -> None:
        """Cancel jobs, or send the job steps of running ones a signal such as "USR1"."""
        if ids:
            asked = [f"--signal={signal}"] if signal else []
            self._run(["scancel", *asked, *_checked(ids)])

    def requeue(self, job_id: str) -> None:
        """Put a running or ended job back into the queue."""
        self._run(["scontrol", "requeue", *_checked([job_id])])

    def release(self, job_id: str) -> None:
        """Let a job that was requeued start at once, not after the delay that Slurm gives it."""
        self._run(["scontrol", "update", f"JobId={_checked([job_id])[0]}", "StartTime=now"])

    def _lines(self, command: Sequence[str]) -> list[str]:
        """Lines of the answer; none where Slurm has forgotten the only job that was asked for, or
        keeps no accounts.
        """
        done = self._start(command, READ_TIMEOUT_S)
        if done.returncode != 0:
            if _NO_RECORD.search(done.stderr):
                return []
            raise _error(command, done)
        return [line for line in done.stdout.splitlines() if line.strip()]

    def _run(self, command: Sequence[str], timeout_s: float = READ_TIMEOUT_S) -> str:
        done = self._start(command, timeout_s)
        if done.returncode != 0:
            raise _error(command, done)
        return done.stdout

    def _find(self, command: str) -> str | None:
        return shutil.which(command, path=self.environment.get("PATH", os.defpath))

    def _start(
        self, command: Sequence[str], timeout_s: float, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        path = self._find(command[0])
        if path is None:
            raise SlurmUnreachable(
                f"{command[0]} is not on the PATH; is this a machine with Slurm?"
            )
        try:
            return subprocess.run(
                [path, *command[1:]],
                input=text,
                stdin=subprocess.DEVNULL if text is None else None,
                capture_output=True,
                encoding="utf-8",
                errors="replace",
                timeout=timeout_s,
                env=self.environment,
            )
        except subprocess.TimeoutExpired:
            raise SlurmUnreachable(
                f"{command[0]} gave no answer in {timeout_s:g} s; is Slurm's controller down?"
            ) from None
        except OSError as error:
            raise SlurmUnreachable(f"{path} cannot be started: {error.strerror}") from None


def _error(command: Sequence[str], done: subprocess.CompletedProcess[str]) -> SlurmError:
    """The error that says what Slurm said."""
    said = [line.strip() for line in (done.stderr or done.stdout).splitlines() if line.strip()]
    words = "; ".join(said) or f"nothing, and ends with {done.returncode}"
    kind = SlurmUnreachable if _UNREACHABLE.search(words) else SlurmError
    return kind(f"{command[0]} says: {words}")


def _checked(ids: Sequence[str]) -> list[str]:
    wrong = [job_id for job_id in ids if not ID.fullmatch(job_id)]
    if wrong:
        raise SlurmError(f"{wrong[0]!r} is no job id, such as 123 or 123_4")
    return list(ids)


def _time(text: str) -> str:
    return "" if text in ("N/A", "Unknown", "None", "NONE") else text


def _queue_record(line: str) -> JobRecord:
    """One line of columns of fixed width."""
    values, start = {}, 0
    for name, width in _QUEUE.items():
        values[name] = line[start : start + width].strip()
        start += width
    restarts, word = values["RestartCnt"], values["State"]
    reason = "" if values["Reason"] in ("None", "N/A") else values["Reason"]
    return JobRecord(
        id=values["JobArrayID"],
        name=values["Name"],
        state=states.state(word),
        word=word,
        reason=reason,
        why=states.why(word, reason),
        partition=values["Partition"],
        nodes=values["NodeList"],
        start=_time(values["StartTime"]),
        end=_time(values["EndTime"]),
        restarts=int(restarts) if restarts.isdecimal() else 0,
    )


def _history_record(line: str) -> JobRecord:
    """One line of `|`; only the name, at the end, may hold that character."""
    job_id, state, start, end, partition, nodes, name = line.split("|", len(_HISTORY) - 1)
    word = (state.split() or [""])[0].rstrip("+")  # "CANCELLED by 1000"
    return JobRecord(
        id=job_id,
        name=name,
        state=states.state(word),
        word=word,
        why=states.why(word, ""),
        partition=partition,
        nodes="" if nodes == "None assigned" else nodes,
        start=_time(start),
        end=_time(end),
    )


def _by_id(jobs: Iterable[JobRecord], ids: Sequence[str]) -> dict[str, JobRecord]:
    """Jobs by id: components "123+1" go into their job, and tasks of an array are found under the
    array's id too.
    """
    out: dict[str, JobRecord] = {}
    for job in jobs:
        job_id, plus, _ = job.id.partition("+")
        known = out.get(job_id)
        if known and plus:
            nodes = ",".join(filter(None, (known.nodes, job.nodes)))
            partitions = dict.fromkeys([*known.partition.split(","), *job.partition.split(",")])
            reason = known.reason or job.reason
            out[job_id] = replace(
                known,
                nodes=nodes,
                partition=",".join(partitions),
                reason=reason,
                why=states.why(known.word, reason),
            )
        else:
            out[job_id] = replace(job, id=job_id)
    wanted = set(ids)
    return {
        job_id: job
        for job_id, job in out.items()
        if not wanted or job_id in wanted or job_id.partition("_")[0] in wanted
    }
