"""A definition that is signed off before training: written without a run, and every deviation told."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from motet.core.errors import UserError
from motet.experiments.design.preregistered import (
    deviations_from,
    preregistration,
    read_preregistration,
)
from tests.launcher.conftest import Main

RUN_YAML = """
name: piece
seed: 1
model: {preset: 1m}
data: {sequence_length: 128, corpora: [{path: corpora/x}]}
batch: {sequences: 8}
layout: {micro_sequences: 2}
training: {steps: 200, schedule: {warmup_steps: 2}}
experiments: [{name: canaries, use: memorization, generate: {count: 16, seed: 1}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, main: Main) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(RUN_YAML)
    (tmp_path / "texts").mkdir()
    for i in range(12):
        text = "".join(f"Sentence {j} of text {i} says {i * j}.\n" for j in range(120))
        (tmp_path / "texts" / f"{i}.txt").write_text(text)
    prepare = ["data", "prepare", "texts", "--output", "corpora/x", "--vocabulary-size", "300"]
    assert main(*prepare, "--quiet", "--processes", "1")[0] == 0
    return tmp_path


def test_what_is_frozen_without_a_run_is_what_a_run_is_frozen_with(
    folder: Path, main: Main
) -> None:
    from motet.experiments.design.frozen import read_definition
    from motet.launcher.config import run_yaml
    from motet.launcher.launch.local import prepare_run
    from motet.launcher.report.standing import first_line
    from motet.launcher.runs.rundir import RunDir
    from motet.launcher.study.preregistration import preregistered

    code, out, err = main("experiments", "freeze", "run.yaml")
    assert code == 0, err
    path = folder / "piece.preregistered.json"
    assert f"motet train run.yaml --preregistered {path.name}" in out
    assert main("experiments", "freeze", "run.yaml")[0] == 2, "never overwritten"
    assert list(folder.glob("runs")) == []
    held = f"experiments.preregistered={path}"
    told = {}
    for name, more in (("same", []), ("other", ["training.steps=240", "experiments.draws=500"])):
        settings = run_yaml.load(Path("run.yaml"), [f"name={name}", held, *more])
        run = RunDir(folder / "runs" / name)
        prepare_run(settings, run, RUN_YAML, model={"vocabulary_size": 300})
        definition, sha256 = read_definition(run.plan)
        told[name] = preregistered(run, definition)["preregistered"]
        assert (sha256 == told[name]["sha256"]) == (name == "same")
    assert told["same"]["deviations"] == []
    deviations = told["other"]["deviations"]
    assert "the length of the run in steps was 200, is 240" in deviations
    assert "analysis.draws was 10000, is 500" in deviations
    assert any(one.startswith("canaries: probe_steps ") for one in deviations)

    study = SimpleNamespace(
        compliance={"preregistered": told["other"]},
        deviations=[],
        standing=SimpleNamespace(told=[]),
    )
    assert (first_line(study) or "").startswith("Deviation from the preregistered definition: ")


def definition(**changes: object) -> dict[str, object]:
    spec = {"name": "a", "alpha": 0.05, "hypothesis": "h"}
    entry = {"spec": spec, "units_sha256": "1", "judged_at_step": 9}
    return {"seed": 1, "analysis": {"draws": 10}, "experiments": [entry], **changes}


def test_a_command_line_holds_a_run_to_a_file_that_must_be_there(folder: Path, main: Main) -> None:
    code, _, err = main("train", "run.yaml", "--preregistered", "gone.json")
    assert code == 2
    assert "gone.json: there is no such file" in err
    assert list(folder.glob("runs/*")) == []


def test_every_deviation_is_a_sentence_that_names_it() -> None:
    was = definition()
    other = {"spec": {"name": "b"}}
    changed = {"spec": {"name": "a", "alpha": 0.05, "hypothesis": "g"}, "units_sha256": "1"}
    assert deviations_from(was, definition()) == []
    assert deviations_from(was, definition(seed=2, experiments=[changed, other])) == [
        "the seed of randomization was 1, is 2",
        "experiment b is in the run and was not registered",
        "a: judged_at_step was 9, is null",
        'a: hypothesis was "h", is "g"',
    ]
    assert deviations_from(was, definition(experiments=[])) == [
        "experiment a was registered and is not in the run"
    ]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-9], "is no JSON"),
        (lambda text: "{}", "is not what `motet experiments freeze` writes"),
        (lambda text: text.replace('"seed":1', '"seed":2'), "was altered since it was written"),
    ],
)
def test_a_file_that_is_none_or_was_altered_is_refused(
    tmp_path: Path, damage: object, said: str
) -> None:
    path = tmp_path / "a.json"
    path.write_text(preregistration(definition()))
    assert read_preregistration(path, "x") == json.loads(json.dumps(definition()))
    assert callable(damage)
    path.write_text(damage(path.read_text()))
    with pytest.raises(UserError, match=said):
        read_preregistration(path, "experiments.preregistered")
