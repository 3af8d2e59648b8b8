"""An experiment class that lives outside the package goes through the whole life of a run."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.system.runs import kill_rank, motet, train_until, write_yaml

OWN = Path(__file__).parents[2] / "examples" / "slogans.py"


def with_slogans(text: str) -> str:
    """The run of the other tests on one process, with one more question."""
    text = text.replace("processes: 2", "processes: 1")
    return text + "    - {name: slogans, use: 'slogans.py:Slogans', doses: [0, 4]}\n"


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    assert said in done.stderr
    assert "Traceback" not in done.stdout + done.stderr


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """A run with the class: checked, trained, killed, resumed without the file next to run.yaml."""
    folder = tmp_path_factory.mktemp("own")
    shutil.copy(OWN, folder)
    yaml = write_yaml(folder, corpus, "own", with_slogans)
    done = motet("experiments", "check", str(yaml))
    assert done.returncode == 0, done.stderr
    done = motet("experiments", "list", str(yaml))
    assert "start: text" in done.stdout
    process, run = train_until(yaml, 8, "training.max_restarts=0")
    kill_rank(run, 0, signal.SIGKILL)
    process.communicate(timeout=240)
    (folder / "slogans.py").unlink()
    done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    return run


def test_it_is_trained_audited_reported_and_exported_from_the_snapshot(resumed: Path) -> None:
    for command in (["experiments", "audit"], ["report"], ["export"]):
        done = motet(*command, str(resumed))
        assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((resumed / "report.json").read_text())
    assert "slogans" in json.dumps(answers)
    definition = json.loads((resumed / "plan" / "definition.json").read_text())
    specs = {entry["spec"]["name"]: entry["spec"] for entry in definition["experiments"]}
    assert len(specs["slogans"]["use_sha256"]) == 64
    assert "use_sha256" not in specs["canaries"]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("missing", "there is no file"),
        ("changed", "is not the source that the run was frozen with"),
    ],
)
def test_a_class_that_is_missing_or_changed_is_one_error_in_every_command(
    resumed: Path, tmp_path: Path, damage: str, said: str
) -> None:
    run = tmp_path / "own"
    shutil.copytree(resumed, run)
    kept = run / "code" / "plugins" / "slogans.py"
    if damage == "missing":
        kept.unlink()
    else:
        kept.write_text(kept.read_text() + "# later\n")
    refused(motet("resume", str(run), "training.steps=30"), said)
    refused(motet("experiments", "audit", str(run)), said)
    refused(motet("report", str(run)), said)
