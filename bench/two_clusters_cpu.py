"""Nodes of unequal speed on one machine: the thread of a rank that computes gets a share of one
core, and no more.

By control groups of the kernel's cpu controller (version 1, which takes single threads). The
threads of a rank that carry packets stay
free, as network cards are: with a quota on all of them, ranks answer each other late whenever they
compute.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from pathlib import Path

from motet.core.processes import children, command_line

CONTROLLER = Path("/sys/fs/cgroup/cpu")
PERIOD_US = 10_000
PRECEDENCE = 20
"""Weight against what else runs on the machine, whose weight is 1: a rank gets its share also where
others compute.
"""
MODULES = ("motet.launcher.worker", "motet.launcher.measure.cluster_worker")


class Shares:
    """One control group for each node, removed at the end.

    Args:
        tag: makes the groups' names this bench's own.
        shares: of one core, by node.

    Raises:
        OSError: the controller is not there, or not ours to use.
    """

    def __init__(self, tag: str, shares: Mapping[str, float]) -> None:
        self.shares = dict(shares)
        self.folders = {node: CONTROLLER / f"motet-{tag}-{node}" for node in shares}

    def __enter__(self) -> Shares:
        if not (CONTROLLER / "tasks").exists():
            raise OSError(f"{CONTROLLER} is not the cpu controller of control groups version 1")
        for node, folder in self.folders.items():
            folder.mkdir(exist_ok=True)
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(int(self.shares[node] * PERIOD_US)))
            (folder / "cpu.shares").write_text(str(1024 * PRECEDENCE))
        return self

    def __exit__(self, *_: object) -> None:
        for folder in self.folders.values():
            for _ in range(50):  # a rank that was killed leaves its group a moment later
                with contextlib.suppress(OSError):
                    folder.rmdir()
                if not folder.exists():
                    break
                time.sleep(0.1)

    def hold(self, node: str, process: int) -> None:
        """Hold the ranks among a process's descendants to their node's share."""
        self._move(process, self.folders[node])

    def free(self, process: int) -> None:
        """Let the ranks among a process's descendants have what they can get."""
        self._move(process, CONTROLLER)

    def _move(self, process: int, group: Path) -> None:
        for rank in ranks(process):
            with contextlib.suppress(ProcessLookupError):  # it has ended
                (group / "tasks").write_text(str(rank))  # its first thread computes


def ranks(process: int) -> list[int]:
    """Return the ranks among a process and its descendants: not torchrun, whose command line names
    them too.
    """
    found = [process]
    for one in found:
        found += children(one)
    return [one for one in found if _is_rank(command_line(one))]


def _is_rank(words: list[str]) -> bool:
    return "torch.distributed.run" not in words and any(module in words for module in MODULES)
