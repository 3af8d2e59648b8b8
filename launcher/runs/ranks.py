"""How the ranks of a run are told from other processes."""

from __future__ import annotations

from motet.core.processes import children_running

WORKER = "motet.launcher.worker"
"""The module that every rank runs, as it stands in the rank's command line."""


def ranks_of(agent: int) -> list[int]:
    """Return the living ranks that torchrun (or `accelerate launch`) started."""
    return children_running(agent, WORKER)
