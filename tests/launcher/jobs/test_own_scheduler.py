"""A scheduler of the user's own is held to the protocol, method by method."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from motet.core.errors import UserError
from motet.core.jobs import CurrentJob, JobExit
from motet.launcher.jobs import job, schedulers
from motet.launcher.jobs.scheduler import Scheduler
from tests.launcher.jobs import local_queue

SOURCE = Path(local_queue.__file__).read_text()
RETURNS = {
    "request": ("None", "JobRequest(())", "3"),
    "size": ("None", "(1, 1.0)"),
    "problems": ("None", "['bad']"),
    "script": ("None", "b'true'"),
    "dependency": ("None",),
    "available": ("None",),
    "trial": ("None",),
    "submit": ("None", "7", "''", "'7\\n'", "'../7'", "'a b'"),
    "query": ("None", "[]", "{'1': 'pending'}", "{'1': JobRecord('1', 'job', 'PENDING')}"),
    "history": ("None", "['1']"),
    "current_job": ("'1'", "CurrentJob('')"),
    "this_node": ("None",),
}


def made(folder: Path, text: str, name: str = "Own") -> schedulers.Scheduler:
    (folder / "own.py").write_text(f"{SOURCE}\n\nclass Own(LocalQueue):\n    {text}\n")
    return schedulers.make(f"own.py:{name}", folder)


@pytest.mark.parametrize(
    ("method", "value"), [(name, value) for name, values in RETURNS.items() for value in values]
)
def test_what_a_method_gives_is_checked(tmp_path: Path, method: str, value: str) -> None:
    scheduler = made(tmp_path, f"def {method}(self, *_, **__):\n        return {value}")
    with pytest.raises(UserError, match=rf"scheduler: .*own\.py:\d+: Own gives .* from {method}"):
        getattr(scheduler, method)()


@pytest.mark.parametrize("method", [*RETURNS, "cancel", "signal", "requeue"])
@pytest.mark.parametrize("mistake", ["1 / 0", "exit(0)", "{}['queue']"])
def test_what_a_method_raises_is_one_error(tmp_path: Path, method: str, mistake: str) -> None:
    scheduler = made(tmp_path, f"def {method}(self, *_, **__):\n        {mistake}")
    with pytest.raises(UserError, match=r"scheduler: is 'own\.py:Own'; .*own\.py:\d+: \w+"):
        getattr(scheduler, method)()


@pytest.mark.parametrize("text", ["title = 3", "queue_hint = None", "recorded = 'LOCAL_'"])
def test_its_class_variables_are_checked(tmp_path: Path, text: str) -> None:
    with pytest.raises(UserError, match=rf"Own has {text.split()[0]}="):
        made(tmp_path, text)


@pytest.mark.parametrize(
    ("requeue", "slept", "asked_for", "code"),
    [
        ("self", [job.ALONE_S, job.HOLD_S], ["7"], 0),
        ("never", [job.ALONE_S], [], 1),
        ("site", [job.HOLD_S], [], 1),
    ],
)
def test_a_job_that_was_told_to_end_and_is_not_ended_goes_on_or_says_why_not(
    requeue: str,
    slept: list[float],
    asked_for: list[str],
    code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked: list[str] = []
    waited: list[float] = []
    queue = SimpleNamespace(current_job=lambda _: CurrentJob("7"), requeue=asked.append)
    found = job.act(JobExit.HOLD, cast(Scheduler, queue), {}, waited.append, requeue)
    assert (waited, asked, found) == (slept, asked_for, code)
    assert ("only this process was told to end" in capsys.readouterr().err) == (requeue != "site")
