"""Slurm's states and reasons (https://slurm.schedmd.com/job_reason_codes.html), in neutral states
and in plain words.
"""

from __future__ import annotations

import re

from motet.core.jobs import JobState

_STATES = {
    "PENDING": JobState.PENDING,
    "REQUEUED": JobState.PENDING,
    "REQUEUE_HOLD": JobState.PENDING,
    "REQUEUE_FED": JobState.PENDING,
    "SPECIAL_EXIT": JobState.PENDING,
    "RESV_DEL_HOLD": JobState.PENDING,
    "RUNNING": JobState.RUNNING,
    "SUSPENDED": JobState.SUSPENDED,
    "STOPPED": JobState.SUSPENDED,
    "COMPLETING": JobState.ENDING,
    "STAGE_OUT": JobState.ENDING,
    "SIGNALING": JobState.ENDING,
    "COMPLETED": JobState.SUCCEEDED,
    "CANCELLED": JobState.CANCELLED,
    "FAILED": JobState.FAILED,
    "TIMEOUT": JobState.FAILED,
    "DEADLINE": JobState.FAILED,
    "PREEMPTED": JobState.FAILED,
    "NODE_FAIL": JobState.FAILED,
    "BOOT_FAIL": JobState.FAILED,
    "OUT_OF_MEMORY": JobState.FAILED,
    "REVOKED": JobState.FAILED,
}
_REASONS = {
    "Priority": "other jobs come first",
    "Resources": "waits until enough nodes are free",
    "Dependency": "waits for an earlier job",
    "DependencyNeverSatisfied": (
        "waits for a job that failed, so it will never start: cancel it, then resume the run"
    ),
    "BeginTime": "its start time has not come (a requeued job waits about two minutes)",
    "JobHeldUser": "held by its owner; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator; ask them",
    "JobHoldMaxRequeue": "held, as it was requeued too often",
    "launch_failed_requeued_held": (
        "held, as a node could not launch it; ask an administrator, then `scontrol release`"
    ),
    "job_requeued_in_held_state": "requeued, but held; `scontrol release` lets it go",
    "NodeDown": "a node that it needs is down",
    "ReqNodeNotAvail": "a node that it needs is down, drained or reserved",
    "Reservation": "waits for its reservation to begin",
    "ReservationDeleted": "its reservation was deleted: cancel it and submit to another",
    "Licenses": "waits for a license",
    "PartitionDown": "its partition accepts jobs, but starts none now",
    "PartitionInactive": "its partition is inactive",
    "PartitionNodeLimit": "asks for more nodes than its partition allows: it will never start",
    "PartitionTimeLimit": "asks for more time than its partition allows: it will never start",
    "BadConstraints": "no nodes have what it asks for: it will never start",
    "InvalidAccount": "its account is not valid",
    "InvalidQOS": "its QOS is not valid",
    "JobArrayTaskLimit": "as many tasks of its array run as may run at once",
    "Cleaning": "its last start is being cleaned up",
    "Prolog": "its nodes are being prepared",
    "FrontEndDown": "the front end node is down",
    "SystemFailure": "Slurm itself failed; ask an administrator",
    "AccountNotAllowed": "its partition does not accept this account",
}
_PATTERNS = (
    (r"QOS.*(PerUser|User)", "the limit of its QOS for one user is reached"),
    (r"QOS.*Account", "the limit of its QOS for one account is reached"),
    (r"QOS", "a limit of its QOS is reached"),
    (r"Assoc(iation)?|^Grp", "a limit of your account is reached"),
    (r"Max(Cpu|GRES|Node|Mem|Jobs|TRES|Wall)", "asks for more than your account allows"),
)
_ENDS = {
    "CANCELLED": "it was cancelled",
    "TIMEOUT": "it reached its time limit",
    "DEADLINE": "it could not end before its deadline",
    "PREEMPTED": "it was preempted",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not boot",
    "OUT_OF_MEMORY": "a node ran out of memory",
    "FAILED": "it failed",
    "REVOKED": "another cluster took it",
}


def state(word: str) -> JobState:
    """Return the neutral state; a word of which nothing is known means that the job is starting."""
    return _STATES.get(word, JobState.STARTING)


def why(word: str, reason: str) -> str:
    """Return why a job waits or how it ended, from its state and reason in Slurm's words; "" while
    it runs.
    """
    found = state(word)
    if found is JobState.PENDING:
        return _waits(reason)
    if found is JobState.SUSPENDED:
        return "Slurm has suspended it"
    if found is JobState.STARTING:
        return f"Slurm says {word}"
    return _ENDS.get(word, "")


def _waits(text: str) -> str:
    """Why a job waits; a reason that is not known here stays as Slurm writes it."""
    code = text.strip().strip("()")
    if not code or code == "None":
        return "Slurm has not looked at it yet"
    word = re.split(r"[,: (]", code, maxsplit=1)[0]
    known = _REASONS.get(code.replace(" ", "_")) or _REASONS.get(word)
    if known is None:
        known = next((words for pattern, words in _PATTERNS if re.search(pattern, word)), None)
    return f"{known} ({code})" if known else code
