"""Slurm's states and reasons in plain words (https://slurm.schedmd.com/job_reason_codes.html)."""

from __future__ import annotations

import re

_REASONS = {
    "Priority": "other jobs come first",
    "Resources": "waits until enough nodes are free",
    "Dependency": "waits for an earlier job",
    "DependencyNeverSatisfied": "waits for a job that failed, so it will never start: cancel it, then resume the run",
    "BeginTime": "its start time has not come (a requeued job waits about two minutes)",
    "JobHeldUser": "held by its owner; `scontrol release` lets it go",
    "JobHeldAdmin": "held by an administrator; ask them",
    "JobHoldMaxRequeue": "held, as it was requeued too often",
    "launch_failed_requeued_held": "held, as a node could not launch it; ask an administrator, then `scontrol release`",
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
    "TIMEOUT": "it reached its time limit",
    "DEADLINE": "it could not end before its deadline",
    "PREEMPTED": "it was preempted",
    "NODE_FAIL": "a node failed",
    "BOOT_FAIL": "a node did not boot",
    "OUT_OF_MEMORY": "a node ran out of memory",
    "FAILED": "it failed",
    "REVOKED": "another cluster took it",
}


def reason(text: str) -> str:
    """Return why a job waits; a reason that is not known here stays as Slurm writes it."""
    code = text.strip().strip("()")
    if not code or code == "None":
        return "Slurm has not looked at it yet"
    word = re.split(r"[,: (]", code, maxsplit=1)[0]
    known = _REASONS.get(code.replace(" ", "_")) or _REASONS.get(word)
    if known is None:
        known = next((words for pattern, words in _PATTERNS if re.search(pattern, word)), None)
    return f"{known} ({code})" if known else code


def end(state: str) -> str:
    """Return how a job ended, from its state in Slurm's records, such as "CANCELLED by 1000"."""
    word = state.split(" ")[0].rstrip("+")
    if word == "CANCELLED":
        return "it was cancelled"
    return _ENDS.get(word, f"Slurm says {word}")
