"""Whom the files of a run are for, over umasks and settings: in a run that takes a second."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from motet.launcher import cli
from motet.launcher.guest.guest import Guest
from tests.launcher.guests import adamw, llama, make_corpus, train, write_yaml
from tests.modes import unlike


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(autouse=True)
def umask() -> Iterator[None]:
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.parametrize(
    ("umask", "access", "expected"),
    [
        (0o022, "umask", 0o755),
        (0o027, "umask", 0o750),
        (0o077, "umask", 0o700),
        (0o002, "umask", 0o775),
        (0o022, "private", 0o700),
        (0o027, "group", 0o2770),
        (0o022, "group", 0o2775),
    ],
)
def test_every_file_of_a_run_is_as_open_as_was_asked_for(
    corpus: Path, tmp_path: Path, umask: int, access: str, expected: int
) -> None:
    os.umask(umask)
    yaml = write_yaml(tmp_path, corpus)
    model = llama()
    guest = Guest(yaml, [f"access={access}"])

    def save(step: int) -> None:
        if step == 6:
            model.save_pretrained(tmp_path / "6")
            guest.saved(6, tmp_path / "6")

    train(guest, model, adamw(model), after=save)
    os.umask(0o077)  # the report is made by somebody else, say
    assert cli.main(["report", str(guest.run.root), "--json"]) == 0
    assert unlike(guest.run.root, expected) == []
    names = {path.name for path in guest.run.root.iterdir()}
    assert {"report.html", "metrics.jsonl", "DONE", "code", "plan", "probes", "ledger"} <= names
