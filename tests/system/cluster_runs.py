"""Runs over the nodes of a testbed, by `motet train --nnodes` on each: used by tests and
`bench/two_clusters.py`.
"""

from __future__ import annotations

import signal
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from motet.parallel.layout.layout import Layout
from motet.slurm.testbed.bed import Testbed
from tests.system.runs import MOTET, environment, rows

END_S = 60.0
POLL_S = 0.05


def layout_words(layout: Layout) -> list[str]:
    """Return the settings that make `motet train` use a layout, one process on each node."""
    shown = {field.name: getattr(layout, field.name) for field in fields(layout)}
    plain = {
        name: list(value) if isinstance(value, tuple) else value for name, value in shown.items()
    }
    words = [f"layout.{name}={_plain(value)}" for name, value in plain.items()]
    return [*words, "layout.processes=1"]


def _plain(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")


class NodesRun:
    """One run that nodes of a testbed train together, from its start to its end.

    Args:
        nodes: in the order of ranks, one process each.
        runs: the folder that all nodes see; output of node N of run R goes to `R-N.txt` in it.
        settings: of `motet train`, besides the name and the folder.
    """

    def __init__(
        self,
        bed: Testbed,
        nodes: Sequence[str],
        yaml: Path,
        name: str,
        port: int,
        settings: Sequence[str] = (),
    ) -> None:
        runs = yaml.parent / "runs"
        runs.mkdir(exist_ok=True)
        self.root, self.nodes = runs / name, tuple(nodes)
        self.outputs = [runs / f"{name}-{node}.txt" for node in nodes]
        words = [*MOTET, "train", str(yaml), f"name={name}", f"runs={runs}", *settings]
        together = ["--nnodes", str(len(nodes)), "--endpoint", f"{nodes[0]}:{port}"]
        self.processes = []
        for rank, (node, output) in enumerate(zip(nodes, self.outputs, strict=True)):
            own = [*together, "--node-rank", str(rank)] if len(nodes) > 1 else []
            with open(output, "wb") as stream:
                self.processes.append(
                    subprocess.Popen(
                        [*bed.enter(node), *words, *own],
                        stdin=subprocess.DEVNULL,
                        stdout=stream,
                        stderr=stream,
                        cwd=yaml.parent,
                        env=environment(),
                    )
                )

    def __enter__(self) -> NodesRun:
        return self

    def __exit__(self, *_: object) -> None:
        """Leave no process: `motet` ends its ranks when it is asked to, and they die with it."""
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def steps(self) -> list[dict[str, Any]]:
        """Return the rows of all steps so far."""
        return rows(self.root, "step")

    def wait(self, step: int, timeout_s: float) -> list[dict[str, Any]]:
        """Wait for a step; returns the rows of all steps so far.

        Raises:
            RuntimeError: a node gave up, or the time is over; with its last words.
        """
        ends = time.monotonic() + timeout_s
        while not (found := self.steps()) or found[-1]["step"] < step:
            if any(process.poll() is not None for process in self.processes):
                raise RuntimeError(self.words(f"ended before step {step}"))
            if time.monotonic() > ends:
                raise RuntimeError(self.words(f"no step {step} after {timeout_s:.0f} s"))
            time.sleep(POLL_S)
        return found

    def stop(self) -> list[dict[str, Any]]:
        """Ask the run to stop; returns the rows of all steps.

        Raises:
            RuntimeError: it did not end well.
        """
        self.processes[0].send_signal(signal.SIGTERM)
        ends = time.monotonic() + END_S
        for process in self.processes:
            try:
                code = process.wait(max(0.1, ends - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise RuntimeError(self.words(f"still there after {END_S:.0f} s")) from None
            if code:
                raise RuntimeError(self.words(f"exit code {code}"))
        return self.steps()

    def words(self, what: str) -> str:
        """What went wrong, and the last words of every node."""
        told = [path.read_text(errors="replace")[-1500:] for path in self.outputs]
        return f"{self.root.name} on {', '.join(self.nodes)}: {what}\n" + "\n".join(told)


def step_seconds(found: Sequence[Mapping[str, Any]], after: int) -> float:
    """Return the median wall clock time from one step to the next, of all steps after step
    `after`.
    """
    later = [row["time"] for row in found if row["step"] >= after]
    return statistics.median(b - a for a, b in pairwise(later))
