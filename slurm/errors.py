"""Errors of Slurm, and of what is asked of it, told as one message."""

from __future__ import annotations

from motet.core.jobs import SchedulerError, SchedulerUnreachable


class SlurmError(SchedulerError):
    """Slurm refused something, or cannot do it: the command line prints the message, without a
    traceback, and exits 2.
    """


class SlurmUnreachable(SlurmError, SchedulerUnreachable):
    """Slurm gave no answer: its commands are not here, or its controller is down.

    What was asked may have happened.
    """
