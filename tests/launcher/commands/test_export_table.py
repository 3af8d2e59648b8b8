"""`motet export RUN --table`: tables on standard output or in a file."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.kept_runs import unpack
from tests.launcher.conftest import Main


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("kept")) / "runs" / "finished"


def written(*arguments: str) -> bytes:
    command = [sys.executable, "-m", "motet.launcher.cli", "export", *arguments]
    done = subprocess.run(command, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_answers_go_to_standard_output_and_nothing_else_does(run: Path) -> None:
    found = pd.read_csv(io.BytesIO(written(str(run), "--table", "csv")))
    report = json.loads((run.parents[1] / "report.json").read_text(encoding="utf-8"))
    effects = {e["name"]: e["primary"]["effect"] for e in report["answers"]["experiments"]}
    primary = found[found.primary & (found.role == "question")]
    assert dict(zip(primary.experiment, primary.effect, strict=True)) == pytest.approx(effects)


def test_any_part_goes_to_a_file(run: Path, main: Main, tmp_path: Path) -> None:
    for part, form, name in (
        ("units", "csv", "u.csv"),
        ("scores", "parquet", "s.parquet"),
        ("metrics", "md", "m.md"),
        ("answers", "latex", "a.tex"),
        ("items", "csv", "i.csv"),
    ):
        path = tmp_path / name
        code, out, err = main(
            "export", str(run), "--table", form, "--what", part, "--output", str(path)
        )
        assert code == 0, err
        assert f"wrote {path}" in out
        assert path.stat().st_size > 100
    assert len(pd.read_parquet(tmp_path / "s.parquet")) == 420
    assert "Effect found" in (tmp_path / "a.tex").read_text()


def test_a_dry_run_writes_nothing(run: Path, main: Main, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    code, out, _ = main("export", str(run), "--table", "csv", "--output", str(path), "--dry-run")
    assert code == 0
    assert f"writes {path} (answers as csv)" in out
    assert not path.exists()


def test_mistakes_are_told(
    run: Path, main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(*arguments: str) -> str:
        code, _, err = main("export", str(run), *arguments)
        assert code == 2
        return err

    assert "--what=units needs a format: --table csv, parquet" in told("--what", "units")
    assert "a table is of the whole run" in told("--table", "csv", "--step", "40")
    assert "a table holds all members" in told("--table", "csv", "--member", "small")
    assert "is a folder" in told("--table", "csv", "--output", str(tmp_path))
    assert "there are csv, parquet, md, latex" in told("--table", "cvs")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert "is not text; give --output FILE" in told("--table", "parquet")
