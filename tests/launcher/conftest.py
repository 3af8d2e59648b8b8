"""Commands as a user types them, and a Slurm that says what a test wants."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from motet.launcher import cli
from tests.launcher.followed import FakeClient

Main = Callable[..., tuple[int, str, str]]


@pytest.fixture
def main(capsys: pytest.CaptureFixture[str]) -> Iterator[Main]:
    before = os.umask(0o022)  # commands change it to that of a run

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out, out.err

    yield call
    os.umask(before)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeClient]:
    def says(*jobs: Any, **options: Any) -> FakeClient:
        client = FakeClient(*jobs, **options)
        made = "motet.launcher.jobs.slurm_scheduler.Client"
        monkeypatch.setattr(made, lambda environment: client)
        return client

    return says
