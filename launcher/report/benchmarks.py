"""What lm-evaluation-harness found of a run's models, as `motet eval` keeps it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from motet.core.errors import UserError
from motet.core.files import read_json
from motet.launcher.runs.rundir import RunDir

FOLDER = re.compile(r"step-(\d+)(?:@(.+?))?(\.inside)?")
"""Name of the folder with results of one model."""


def benchmarks(folder: Path) -> dict[str, dict[str, float]]:
    """Return {task: {metric: value}} of the results of lm-evaluation-harness in a folder; of a task
    that was measured twice the newest. A file that cannot be read is left out.
    """
    found: dict[str, dict[str, float]] = {}
    for file in sorted(folder.rglob("results_*.json"), key=lambda path: path.stat().st_mtime):
        try:
            results = read_json(file)["results"].items()
            for task, values in results:
                numbers = {k: v for k, v in values.items() if isinstance(v, int | float)}
                found[task] = numbers
        except (UserError, KeyError, TypeError, AttributeError):
            continue
    return found


def benchmark_rows(rundir: RunDir) -> list[dict[str, Any]]:
    """Return one row for each metric of each task of each model: step, member ("whole" is the whole
    model), whether Motet's own decoder scored, task, metric, value, standard error.
    """
    return list(_rows(rundir)) if rundir.evaluations.is_dir() else []


def _rows(rundir: RunDir) -> Iterator[dict[str, Any]]:
    for folder in sorted(rundir.evaluations.iterdir()):
        match = FOLDER.fullmatch(folder.name)
        if match is None:
            continue
        step, member, inside = match.groups()
        for task, values in benchmarks(folder).items():
            for metric, value in values.items():
                name, _, rest = metric.partition(",")
                if name.endswith("_stderr") or name == "sample_len":
                    continue
                yield {
                    "step": int(step),
                    "member": member or "whole",
                    "inside": bool(inside),
                    "task": task,
                    "metric": name,
                    "value": value,
                    "stderr": values.get(f"{name}_stderr,{rest}" if rest else f"{name}_stderr"),
                }
