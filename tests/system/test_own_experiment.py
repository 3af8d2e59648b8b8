"""An experiment class that lives outside the package goes through the whole life of a run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from motet.core.hashing import sha256_hex
from motet.experiments.scoring.store import read_probe
from tests.system.runs import kill_rank, motet, train_until, write_yaml

pytestmark = pytest.mark.xdist_group("own_experiment")  # one run for most
OWN = Path(__file__).parents[2] / "examples" / "slogans.py"


def with_slogans(text: str) -> str:
    """The run of the other tests on one process, with one more question. Its test is declared, and
    so is that of the canaries.
    """
    text = text.replace("processes: 2", "processes: 1")
    one, three = "doses: [0, 2], generate: {count: 12}", "doses: [0, 2, 4], generate: {count: 18}"
    assert one in text
    text = text.replace(one, f"test: omnibus, {three}")
    own = "{name: slogans, use: 'slogans.py:Slogans', doses: [0, 2, 4], test: trend}"
    return f"{text}    - {own}\n"


def with_package(text: str) -> str:
    """The same class under the name that an installed package gives it, and one that `motet
    experiments new` wrote.
    """
    packed = with_slogans(text).replace("slogans.py:Slogans", "wise-slogans")
    return f"{packed}    - {{name: greetings, use: 'greetings.py:Greetings'}}\n"


def refused(done: subprocess.CompletedProcess[str], said: str) -> None:
    """An audit finds that something is wrong with a run (1); other commands do nothing (2)."""
    audit = "audit" in done.args
    assert done.returncode == (1 if audit else 2), done.stdout + done.stderr
    assert said in (done.stdout if audit else done.stderr)
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
    assert (specs["canaries"]["test"], specs["slogans"]["test"]) == ("omnibus", "trend")


def test_declared_tests_are_answered_with_their_arms_and_negative_controls(resumed: Path) -> None:
    done = motet("report", str(resumed))
    assert done.returncode == 0, done.stderr
    report = json.loads((resumed / "report.json").read_text())
    entries = {entry["name"]: entry for entry in report["answers"]["experiments"]}
    page = (resumed / "report.html").read_text()
    for name, test in (("canaries", "omnibus"), ("slogans", "trend")):
        entry = entries[name]
        primary, control = entry["primary"], entry["negative_control"]
        assert primary["test"] == test
        assert 0 < primary["p"] <= 1
        assert (primary["effect"] is None) == (test == "omnibus")
        assert [row["dose"] for row in primary["per_arm"]] == [0, 2, 4]
        for row in primary["per_arm"][1:]:
            assert row["low"] < row["effect"] < row["high"]
        assert entry["verdict"]["kind"] in {"found", "not_found", "saturated", "invalid"}
        assert control["step"] == 0
        assert 0 < control["p"] <= 1
        assert control["contrast"] == primary["contrast"]
        for told in (entry["verdict"]["sentence"], control["sentence"]):
            assert told.split(": ", 1)[-1][:40] in page
    assert "all at once" in entries["canaries"]["primary"]["contrast"]
    assert "slope over the doses 0, 2, 4" in entries["slogans"]["primary"]["contrast"]
    assert "per doubling" in done.stdout


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


def test_a_class_that_was_renamed_in_the_record_is_one_error(resumed: Path, tmp_path: Path) -> None:
    """All hashes fit but that of manifest.json: only the name is gone."""
    run = tmp_path / "own"
    shutil.copytree(resumed, run)
    kept = run / "code" / "plugins" / "slogans.py"
    kept.write_text(kept.read_text().replace("class Slogans", "class Sayings"))
    path = run / "plan" / "definition.json"
    before = sha256_hex(OWN.read_bytes())
    text = path.read_text().replace(before, sha256_hex(kept.read_bytes()))
    was = sha256_hex(path.read_bytes())
    path.write_text(text)
    manifest = run / "manifest.json"
    assert was in manifest.read_text()
    manifest.write_text(manifest.read_text().replace(was, sha256_hex(text.encode())))
    said = "has no class 'Slogans'"
    refused(motet("resume", str(run), "training.steps=30"), said)
    refused(motet("experiments", "audit", str(run)), said)
    done = motet("report", str(run))
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith(
        "The run folder is damaged, so it has no answers: manifest.json was"
    )
    assert len(list((run / "attempts").iterdir())) == len(list((resumed / "attempts").iterdir()))


def test_a_class_of_an_installed_package_is_trained_audited_and_reported(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "site" / "sayings" / "wise" / "slogans.py"
    module.parent.mkdir(parents=True)
    for folder in (module.parent, module.parent.parent):
        (folder / "__init__.py").touch()
    shutil.copy(OWN, module)
    record = tmp_path / "site" / "sayings-1.0.dist-info"
    record.mkdir()
    (record / "METADATA").write_text("Metadata-Version: 2.1\nName: sayings\nVersion: 1.0\n")
    offered = "[motet.experiments]\nwise-slogans = sayings.wise.slogans:Slogans\n"
    (record / "entry_points.txt").write_text(offered)
    paths = [str(tmp_path / "site"), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    yaml = write_yaml(tmp_path, corpus, "packed", with_package)
    run = tmp_path / "runs" / "packed"
    assert "wise-slogans" in motet("experiments", "list", cwd=tmp_path).stdout
    for command in (
        ["experiments", "new", "greetings"],
        ["experiments", "check", str(yaml)],
        ["train", str(yaml)],
        ["report", str(run)],
        ["experiments", "audit", str(run)],
    ):
        done = motet(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((run / "report.json").read_text())["answers"]
    assert {"slogans", "greetings"} <= {entry["name"] for entry in answers["experiments"]}
    _, scores = read_probe(max((run / "probes").glob("step-*.npz")))
    written = scores["greetings"].generated
    assert written is not None
    assert {len(ids) for ids in written.tokens} <= set(range(9))
    assert any(written.texts)
    assert scores["slogans"].generated is None
    kept = run / "code" / "plugins" / "installed" / "sayings.wise.slogans.py"
    assert kept.read_bytes() == OWN.read_bytes()
    module.write_text(module.read_text() + "# the next version\n")
    longer = ["resume", str(run), "training.steps=30"]
    for command in (longer, ["experiments", "audit", str(run)], ["report", str(run)]):
        done = motet(*command, cwd=tmp_path)
        refused(done, "install the version of then")
        assert str(kept) in done.stdout + done.stderr
    module.unlink()
    refused(motet(*longer, cwd=tmp_path), "is not installed")
    refused(motet("report", str(run), cwd=tmp_path), "is not installed")
