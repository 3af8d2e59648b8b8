"""The short run that calibrates a plan: which ranked layout this machine can train, and with which
settings. No torch.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from types import FrameType
from typing import Any

from motet.core.errors import UserError
from motet.launcher.planning import table as plan_table
from motet.launcher.planning.prediction import LEAST_STEPS, WARM_UP_STEPS
from motet.launcher.runs.metrics import read_metrics, rows_of
from motet.launcher.runs.rundir import RunDir
from motet.parallel.cluster.description import Cluster
from motet.parallel.layout.layout import Layout
from motet.parallel.planner.question import PlanAnswer, RankedLayout
from motet.parallel.planner.which_probe import probes

PROBE_S = 60.0
"""How long steps are trained, at least `ENOUGH_STEPS`."""
ENOUGH_STEPS = WARM_UP_STEPS + 2 * LEAST_STEPS
ROOM = 1.5
"""The run is this much longer than the prediction needs for that, in case steps are faster."""
LOOK_S = 1.0
PLAIN: Mapping[str, Any] = {
    # What makes the run short and leaves no trace but its own folder.
    "training.tokens": None,
    "batch.ramp": [],
    "experiments.list": [],
    "experiments.files": [],
    "experiments.controls": False,
    "experiments.lock": None,
    "checkpoint.every_steps": 0,
    "training.schedule.warmup_steps": 0,
    "metrics.wandb": "off",
    "metrics.log_every": 1,
}


def missing(choice: RankedLayout, here: Cluster) -> str:
    """Return what a layout needs that this machine lacks; "" where it can be trained here."""
    groups = choice.cluster.groups
    if choice.layout.engine == "deepspeed" and find_spec("deepspeed") is None:
        return "DeepSpeed (pip install deepspeed)"
    if len(groups) > 1 or groups[0].nodes > 1:
        nodes = " and ".join(f"{group.nodes:,} of {group.name}" for group in groups)
        return f"nodes: {nodes}"
    needed, (found,) = groups[0], here.groups
    kind = needed.device.kind
    if kind == "cpu":
        return ""  # cores are shared by however many processes
    if kind != found.device.kind or needed.devices > found.devices:
        word = "GPUs" if found.device.kind != "cpu" else "CPU cores"
        shown = f"{found.devices} {found.device.kind}" if word == "GPUs" else "no GPU"
        return f"{needed.devices} {kind} on a node (here: {shown})"
    return ""


def chosen(answer: PlanAnswer, number: int, here: Cluster) -> tuple[int, str]:
    """Return the number of the layout to run, and what this machine lacks for it ("" = nothing).

    Args:
        number: as asked; 0: the most telling that this machine can run, else the most telling of
            all.

    Raises:
        UserError: there is no such layout.
    """
    if number > len(answer.choices):
        raise UserError(f"--probe {number}: only {len(answer.choices)} layouts are ranked")
    if number:
        return number, missing(answer.choices[number - 1], here)
    ranked = [probe.number for probe in probes(answer.choices) if _one_kind(answer, probe.number)]
    if not ranked:
        raise UserError(
            "--probe: every ranked layout is on several kinds of devices, whose constants one run "
            "cannot tell apart; "
            "plan for one of them (--cluster), or name a layout"
        )
    lacks = {one: missing(answer.choices[one - 1], here) for one in ranked}
    found = next((one for one in ranked if not lacks[one]), ranked[0])
    return found, lacks[found]


def _one_kind(answer: PlanAnswer, number: int) -> bool:
    groups = answer.choices[number - 1].cluster.groups
    return len({group.device.kind for group in groups}) == 1


def overrides(choice: RankedLayout, name: str, runs: str, cluster: str | None) -> list[str]:
    """Return the settings that make a run.yaml the short run of a layout, as `a.b.c=value`.

    Args:
        name: of the run.
        runs: the folder of runs.
        cluster: file of the layout's machines; None: this machine by data sheets.
    """
    steps = steps_of(choice, ROOM)
    values: dict[str, Any] = {"name": name, "runs": runs, "training.steps": steps, **PLAIN}
    plain = {key: getattr(Layout(), key) for key in Layout.__dataclass_fields__}
    for key, value in {**plain, **plan_table.section(choice), "cluster": cluster}.items():
        values[f"layout.{key}"] = value
    return [f"{key}={_word(value)}" for key, value in values.items()]


def _word(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_word, value))}]"
    return str(value)


def job_words(choice: RankedLayout) -> list[str]:
    """Return the settings that ask Slurm for the nodes of a layout, for a quarter of an hour."""
    groups = plan_table.job_groups(choice)
    shown = ",".join(f"{{{', '.join(f'{k}: {v}' for k, v in one.items())}}}" for one in groups)
    return [f"slurm.groups=[{shown}]", "slurm.time=15:00"]


def steps_of(choice: RankedLayout, room: float = 1.0) -> int:
    """Return how many steps of a layout take `PROBE_S`, times `room`, as predicted; at least
    `ENOUGH_STEPS`.
    """
    return max(ENOUGH_STEPS, math.ceil(room * PROBE_S / choice.prediction.step_time_s))


class Timer:
    """Asks this process to stop its run, as a person would, once the run has trained for long
    enough; main thread only.
    """

    def __init__(self, run: RunDir, probe_s: float) -> None:
        self.run, self.probe_s = run, probe_s
        self.fired = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="probe-timer", daemon=True)

    def __enter__(self) -> Timer:
        self._before = signal.signal(signal.SIGTERM, self._outside)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
        signal.signal(signal.SIGTERM, self._before)

    def _outside(self, number: int, frame: FrameType | None) -> None:
        """Hear a SIGTERM while the run's own handler is not there: before it starts, or when it has
        just ended by itself.
        """
        if not self.fired:
            raise KeyboardInterrupt

    def _watch(self) -> None:
        began: float | None = None
        while not self._over.wait(LOOK_S):
            steps = rows_of(read_metrics(self.run.metrics), "step")
            if steps and began is None:
                began = time.monotonic()
            if enough(steps, time.monotonic() - (began or 0.0), self.probe_s):
                self.fired = True
                os.kill(os.getpid(), signal.SIGTERM)
                return


def enough(steps: Sequence[Mapping[str, Any]], trained_s: float, probe_s: float) -> bool:
    """Return whether the steps of a run (rows of metrics.jsonl) tell how long one takes, and have
    been trained for a while: `trained_s` since the first was seen.
    """
    return len(steps) >= ENOUGH_STEPS and trained_s >= probe_s
