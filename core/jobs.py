"""What a scheduler of batch jobs says, in neutral terms: states, records, where a process stands.

These values lie in the lowest room because both sides of the scheduler protocol make them: the
rooms of schedulers, which may not import the launcher, and the launcher itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum, IntEnum

from motet.core.errors import UserError

JOB_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,127}")
"""What may be a job's id: it stands in commands, names of files and messages."""


class SchedulerError(UserError):
    """A scheduler refused something, or cannot do it; the message is in its own words."""


class SchedulerUnreachable(SchedulerError):
    """A scheduler gave no answer. What was asked may have happened."""


class JobState(Enum):
    """What a job does. Words of schedulers are translated where they are read, and nowhere else."""

    PENDING = "pending"
    STARTING = "starting"
    RUNNING = "running"
    SUSPENDED = "suspended"
    ENDING = "ending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    """It ended otherwise: an error, a preemption, its time limit, a lost node."""
    CANCELLED = "cancelled"


FINISHED_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
"""States in which nothing will happen any more. There is no other list of them."""


class JobExit(IntEnum):
    """What becomes of a job when its step has ended: the exit code that its script acts on."""

    FINE = 0
    FAILED = 1
    REQUEUE = 10
    """Ask the scheduler to requeue the job."""
    HOLD = 11
    """Stay until the scheduler requeues the job, or ends it."""


@dataclass(frozen=True)
class JobRecord:
    """What a scheduler knows of one job.

    Attributes:
        id: matches `JOB_ID`.
        word: the state as the scheduler writes it, for people.
        reason: why it waits, as the scheduler writes it; "" otherwise.
        why: why it waits, or how it ended, in plain words.
        partition: the queue that it is in.
        nodes: list of nodes.
        start, end: local ISO time of the start and of the end, perhaps predicted; "" where none
            is known.
        restarts: how often it was requeued; 0 where the scheduler does not tell.
    """

    id: str
    name: str
    state: JobState
    word: str = ""
    reason: str = ""
    why: str = ""
    partition: str = ""
    nodes: str = ""
    start: str = ""
    end: str = ""
    restarts: int = 0

    @property
    def finished(self) -> bool:
        """Whether nothing of it will happen any more."""
        return self.state in FINISHED_STATES


@dataclass(frozen=True)
class NodeGroup:
    """Nodes of one kind that a job asks for.

    Attributes:
        partition: the queue; "" = the site's default.
        processes, cpus, gpus: per node.
        gpu_type: kind of GPU, as the site names it.
    """

    partition: str = ""
    nodes: int = 1
    processes: int = 1
    cpus: int = 1
    gpus: int = 0
    gpu_type: str = ""


@dataclass(frozen=True)
class CurrentJob:
    """The job that a process belongs to.

    Attributes:
        restarts: how often the scheduler says that it was requeued.
    """

    id: str
    restarts: int = 0


@dataclass(frozen=True)
class JobNode:
    """The node of a job on which a process runs.

    Attributes:
        job_id: equal on all nodes of the job.
        hosts: names of all hosts, by group of nodes; the first one holds the rendezvous.
        rank: of this node among all, from 0; groups come one after the other.
        cpus: that the job has here; None = those that the process may use.
    """

    job_id: str
    hosts: tuple[tuple[str, ...], ...]
    rank: int
    cpus: int | None = None
