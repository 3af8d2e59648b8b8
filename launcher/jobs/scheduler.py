"""The scheduler protocol: what Motet asks of whatever starts its jobs, in neutral terms.

A scheduler of one's own extends `Scheduler` in a file next to run.yaml, and `scheduler:
my_scheduler.py:MyQueue` names it (docs/schedulers.md). Nothing here knows of any scheduler.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from motet.core.errors import Problem
from motet.core.jobs import CurrentJob, JobNode, JobRecord, NodeGroup
from motet.launcher.config.sections import RunSettings

OPTIONS = "scheduler_options"
"""Section of run.yaml for schedulers that have none of their own."""


@dataclass(frozen=True)
class JobRequest:
    """What a run asks of its scheduler, read from its settings.

    Attributes:
        groups: nodes by kind; ranks are numbered in this order.
        section: of run.yaml that holds what is asked for; messages name settings in it.
        limit_s: of one job; None = the scheduler's own.
        requeue: "self" (the job asks to be requeued), "site" (it waits until that is done) or
            "never".
        max_requeues: the job ends after so many.
        chain: jobs submitted at once, each going on from the one before.
        seeds: one run of each, all of them one array of jobs; () = a single run.
        first_port: the first of 1,000 ports, of which a job's id chooses the one where nodes meet.
        secrets: name -> file that is read on every node.
        python: of the job; "" = the one that submits.
        container: words before python.
    """

    groups: tuple[NodeGroup, ...]
    section: str = OPTIONS
    limit_s: int | None = None
    requeue: str = "self"
    max_requeues: int = 20
    chain: int = 1
    seeds: tuple[int, ...] = ()
    first_port: int = 29_600
    secrets: Mapping[str, str] = field(default_factory=dict)
    python: str = ""
    container: tuple[str, ...] = ()

    @property
    def world_size(self) -> int:
        """Processes over all nodes of all groups."""
        return sum(group.nodes * group.processes for group in self.groups)

    @property
    def nodes(self) -> int:
        """Nodes of all groups."""
        return sum(group.nodes for group in self.groups)


@dataclass(frozen=True)
class JobCommands:
    """What a job has to start: the words of each command, without the folder of the run.

    Attributes:
        python: its interpreter, with the words of a container before it.
        whole: module that does all of a job whose script does nothing else: it begins, starts
            `node` (or the words after the folder), passes signals on, ends and asks for a requeue.
        hook: module that a script of the scheduler's own calls with `begin RUN` before the step
            (prints the attempt, or nothing) and `end RUN CODE ASKED` after it (see `JobExit`).
        node: module that runs once on each node.
    """

    python: tuple[str, ...]
    whole: str
    hook: str
    node: str


class Scheduler(ABC):
    """Starts jobs and knows what becomes of them.

    A job is a list of commands that runs once on nodes of its own. It may be requeued: then it
    begins again, under the same id. It is told before its end by a signal to all its processes:
    SIGUSR1 or SIGTERM makes ranks save and stop.

    Methods raise `SchedulerUnreachable` when there is no answer, and another `SchedulerError` for
    a refusal.
    """

    title: ClassVar[str] = ""
    """Its name in messages; "" = that of its class."""
    queue_hint: ClassVar[str] = "its queue"
    """How a person looks at their jobs, in the middle of a sentence."""
    recorded: ClassVar[tuple[str, ...]] = ()
    """What begins the names of its variables that are kept with an attempt; none may be a
    secret.
    """

    # --- what a run asks for: pure

    @abstractmethod
    def request(self, settings: RunSettings) -> JobRequest:
        """Return what a run asks for."""

    def size(self, settings: RunSettings) -> tuple[int, int]:
        """Return (nodes, processes of all of them); override it where `request` needs settings
        without a fault: all problems of a run.yaml are told at once.
        """
        request = self.request(settings)
        return request.nodes, request.world_size

    def problems(self, settings: RunSettings, environment: Mapping[str, str]) -> list[Problem]:
        """Return what can be seen to be wrong before anything is asked, on the machine that
        submits.
        """
        return []

    @abstractmethod
    def script(self, settings: RunSettings, root: str, commands: JobCommands) -> str:
        """Return the text of a job.

        Args:
            settings: of the run; of an array, those that its runs were made of.
            root: folder of the run; of an array, its path up to the seed.
        """

    def dependency(self, settings: RunSettings, after: str = "") -> str:
        """Return what a job waits for, in the scheduler's words; `after`: the job of the same run
        that it goes on from.
        """
        return after

    # --- asking the scheduler

    def available(self) -> str:
        """Return why it cannot be asked on this machine; "" when it can."""
        return ""

    def trial(self, script: str) -> str:
        """Return what the scheduler says of a job that is not submitted, in one line; raise when it
        would be refused.
        """
        return ""

    @abstractmethod
    def submit(self, script: Path, dependency: str = "") -> str:
        """Submit a job and return its id.

        Args:
            dependency: what it waits for beside what its script says; "" = nothing.
        """

    @abstractmethod
    def query(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Return the jobs that wait, run or ended lately, by id; a forgotten one is absent.

        One call asks for all of them; without ids all jobs of this user are asked for.
        """

    def history(self, ids: Sequence[str]) -> dict[str, JobRecord]:
        """Return ended jobs that `query` has forgotten, where accounts are kept."""
        return {}

    @abstractmethod
    def cancel(self, ids: Sequence[str]) -> None:
        """End jobs for good, whatever they do."""

    @abstractmethod
    def signal(self, ids: Sequence[str], name: str) -> None:
        """Send a signal such as "USR1" to the processes of running jobs."""

    @abstractmethod
    def requeue(self, job_id: str) -> None:
        """Put a running job back into the queue, as it asks for itself. It is ended meanwhile."""

    # --- inside of a job

    @abstractmethod
    def current_job(self, environment: Mapping[str, str]) -> CurrentJob | None:
        """Return the job that this process belongs to, None outside of one."""

    @abstractmethod
    def this_node(self, environment: Mapping[str, str]) -> JobNode:
        """Return the node that this process, one of one per node, runs on."""

    def probed_node(self, environment: Mapping[str, str]) -> JobNode | None:
        """Return the node of a job of several nodes on each of which this command was started; None
        elsewhere. For commands that are not of a run.
        """
        return None

    @property
    def name(self) -> str:
        """Its name in messages."""
        return self.title or type(self).__name__
