"""A definition that is signed off before training: written without a run, and every deviation told."""

from __future__ import annotations

import json
from itertools import pairwise
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


def test_the_exact_insertions_of_a_run_are_published_with_text_and_place(
    folder: Path, main: Main
) -> None:
    from motet.experiments.design.frozen import read_definition
    from motet.experiments.stream.exposure_plan import ExposurePlan
    from motet.launcher.config import run_yaml
    from motet.launcher.launch.local import prepare_run
    from motet.launcher.runs.rundir import RunDir

    pq = pytest.importorskip("pyarrow.parquet")
    run = RunDir(folder / "runs" / "piece")
    prepare_run(run_yaml.load(Path("run.yaml"), []), run, RUN_YAML, model={"vocabulary_size": 300})
    assert main("experiments", "export", "runs/piece", "run.parquet", "--dry-run")[0] == 0
    assert not Path("run.parquet").exists()
    code, out, err = main("experiments", "export", "runs/piece", "run.parquet")
    assert code == 0, err
    assert main("experiments", "export", "run.yaml", "ahead.jsonl")[0] == 0
    assert main("experiments", "export", "run.yaml", "ahead.jsonl")[0] == 2, (
        "nothing is overwritten"
    )
    table = pq.read_table("run.parquet")
    rows = table.to_pylist()
    facts, *lines = [json.loads(line) for line in Path("ahead.jsonl").read_text().splitlines()]
    assert lines == rows, "a run.yaml says before training what its run will have"
    assert json.loads(table.schema.metadata[b"motet"]) == facts
    _, sha256 = read_definition(run.plan)
    assert facts["definition_sha256"] == sha256
    plan = ExposurePlan(run.plan / "exposures.plan")
    assert f"{len(plan):,} insertions" in out
    assert len(rows) == len(plan) > 100
    assert [row["position"] for row in rows] == sorted(row["position"] for row in rows)
    for row in rows:
        slot, offset = divmod(row["position"], plan.sequence_length)
        assert row["tokens"] in [ids.tolist() for at, ids in plan.lookup(slot) if at == offset]
    units = [json.loads(line) for line in (run.plan / "units" / "canaries.jsonl").open()]
    by_id = {unit["id"]: unit for unit in units}
    mine = [row for row in rows if row["experiment"] == "canaries"]
    shown = [row for row in mine if not row["placebo"]]
    assert {row["arm"] for row in mine} == {unit["arm"] for unit in units}
    for row in shown:
        assert row["text"] == by_id[row["unit"]]["texts"][0]
        assert row["arm"] == by_id[row["unit"]]["arm"]


def test_a_set_of_somebody_else_is_consumed_at_its_exact_places(folder: Path, main: Main) -> None:
    from motet.launcher.config import run_yaml
    from motet.launcher.study.before_training import build

    pq = pytest.importorskip("pyarrow.parquet")
    pa = pytest.importorskip("pyarrow")
    assert (
        main("experiments", "export", "run.yaml", "a.parquet", "experiments.controls=false")[0] == 0
    )
    code, out, err = main("experiments", "import", "a.parquet")
    assert code == 0, err
    assert "made for data.sequence_length=128" in out
    other = RUN_YAML.replace("seed: 1\n", "seed: 5\n", 1).replace("name: canaries", "name: mine")
    other = other.replace(
        "experiments: [",
        "experiments:\n  insertions: a.insertions.jsonl\n  controls: false\n  list: [",
    )
    Path("other.yaml").write_text(other)
    study = build(run_yaml.load(Path("other.yaml"), []))
    rows = pq.read_table("a.parquet").to_pylist()
    assert study.plan.experiments[-1] == "imported"
    plan, length = study.plan, study.plan.sequence_length
    found = {}
    for number in range(len(plan.rows)):
        place = int(plan.rows.slot[number]) * length + int(plan.rows.offset[number])
        first, last = plan.texts.offsets[plan.rows.text[number] :][:2]
        found[place] = plan.texts.tokens[first:last].tolist()
    assert {row["position"]: row["tokens"] for row in rows}.items() <= found.items()
    ends = sorted((place, place + len(ids)) for place, ids in found.items())
    assert all(stop <= start for (_, stop), (start, _) in pairwise(ends))
    # As others publish theirs: position, text, experiment.
    theirs = [
        {"position": 128 * n + 3, "text": f"Fact {n}.", "experiment": "facts"} for n in range(9)
    ]
    pq.write_table(pa.Table.from_pylist(theirs), "peer.parquet")
    assert main("experiments", "import", "peer.parquet", "--output", "peer.jsonl")[0] == 0
    Path("other.yaml").write_text(other.replace("a.insertions.jsonl", "peer.jsonl"))
    study = build(run_yaml.load(Path("other.yaml"), []))
    mine = study.plan.rows.experiment == len(study.questions)
    assert (study.plan.rows.slot[mine] * 128 + study.plan.rows.offset[mine]).tolist() == [
        row["position"] for row in theirs
    ]
    for row, said in [
        ({"position": 126, "text": "too long for the end"}, "cross the end of a sequence of 128"),
        ({"position": 10**9, "text": "a"}, "lie after the end of this run"),
        ({"position": 4, "text": "Sentence"}, "rows 0 and 9 overlap"),
    ]:
        lines = [json.dumps(one) + "\n" for one in [*theirs, row]]
        Path("peer.jsonl").write_text("".join(lines))
        code, _, err = main("experiments", "check", "other.yaml")
        assert code == 2
        assert said in err
    Path("run.yaml").write_text(other.replace("seed: 5", "seed: 1").replace("mine", "canaries"))
    code, _, err = main("experiments", "check", "run.yaml")
    assert code == 2
    assert "shows 12 units of canaries" in err, "those with a dose, of the same names"
    Path("peer.jsonl").write_text(json.dumps({"position": 3, "tokens": [5], "noise": True}))
    code, _, err = main("experiments", "import", "peer.jsonl", "--output", "x.jsonl")
    assert code == 2
    assert "row 0 has noise on its embeddings, which cannot be imported" in err
