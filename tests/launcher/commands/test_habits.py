"""What people type without having read anything: a run.yaml for its run, help, completion."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import yaml

from motet.core.errors import UserError
from motet.core.files import atomic_write
from motet.launcher.commands import common
from motet.launcher.config.json_schema import run_schema
from motet.launcher.config.sections import RunSettings
from motet.parallel.cluster.devices import DEVICES
from motet.parallel.cluster.file import ClusterError, from_mapping
from motet.parallel.cluster.json_schema import cluster_schema
from tests.launcher.conftest import Main
from tests.launcher.followed import make_run

ROOT = Path(__file__).parents[3]
YAML = "name: first\ntraining: {steps: 9}\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text(YAML)
    return tmp_path


def made(folder: Path, name: str, text: str) -> None:
    atomic_write(make_run(folder / "runs", name).run_yaml, text)


@pytest.mark.parametrize("asked", ["run.yaml", "first", "runs/first", "runs/first/resolved.yaml"])
def test_a_run_is_named_by_its_folder_its_name_or_its_run_yaml(folder: Path, asked: str) -> None:
    made(folder, "first", YAML)
    made(folder, "other", YAML + "\n# Given on the command line:\n#   name=other\n")
    assert common.open_run(asked).root.resolve() == folder / "runs/first"


def test_a_run_yaml_from_another_folder_finds_its_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(folder, "first", YAML)
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    assert common.open_run("../run.yaml").root == folder / "runs/first"


def test_a_run_yaml_that_is_broken_by_now_still_names_its_run(folder: Path) -> None:
    made(folder, "first", YAML)
    (folder / "run.yaml").write_text("name: first\ntraining: {steps: nine, stpes: 1}\n")
    assert common.open_run("run.yaml").name == "first"


def test_a_run_under_another_name_and_an_array_of_seeds_are_found(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no run yet: there is no .*first; `motet train run"):
        common.open_run("run.yaml")
    made(folder, "renamed", YAML + "\n# Given on the command line:\n#   name=renamed\n")
    assert common.open_run("run.yaml").name == "renamed"
    made(folder, "first-seed1", "something else")
    with pytest.raises(UserError, match=r"has 2 runs; give one of .*first-seed1, .*renamed"):
        common.open_run("run.yaml")


def test_a_file_that_is_no_run_yaml_is_refused(folder: Path) -> None:
    (folder / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"notes.txt is no run; give its folder"):
        common.open_run("notes.txt")


COMMANDS: list[list[str]] = [
    ["report", "--dry-run"],
    ["status"],
    ["logs"],
    ["cancel", "--dry-run"],
    ["export", "--dry-run"],
    ["eval", "--tasks", "x", "--dry-run"],
    ["resume", "--dry-run"],
    ["experiments", "audit"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_every_command_of_a_run_takes_its_run_yaml(
    folder: Path, main: Main, command: list[str]
) -> None:
    made(folder, "first", YAML)
    said = [main(*command, name) for name in ("runs/first", "first", "run.yaml")]
    assert "Traceback" not in said[0][2]
    plain = [
        (code, re.sub(r"\S*runs/first", "runs/first", out), re.sub(r"\S*runs/first", "RUN", err))
        for code, out, err in said
    ]
    assert plain[0] == plain[1] == plain[2]
    assert "no run yet" not in said[2][2]


def test_nothing_asked_is_answered_with_help(main: Main) -> None:
    assert main() == main("--help") == main("help")
    assert main("data") == main("data", "--help") == main("help", "data")
    assert main("help", "data", "prepare") == main("data", "prepare", "--help")
    assert main()[0] == 0
    assert main("-V") == main("--version")
    code, _, err = main("help", "trian")
    assert (code, "did you mean 'train'?" in err) == (2, True)


def test_what_may_be_left_out_is_not_called_required(main: Main) -> None:
    code, _, err = main("train")
    assert (code, err) == (2, "motet train: the following arguments are required: RUN.yaml\n")


def test_completion_knows_every_command_and_option(main: Main, tmp_path: Path) -> None:
    for shell in ("bash", "zsh", "fish", "tcsh"):
        code, out, _ = main("completion", shell)
        assert code == 0
        assert "prepare" in out
        assert "vocabulary-size" in out
    script = tmp_path / "motet.bash"
    script.write_text(main("completion", "bash")[1])
    ask = (
        f"source {script}\nCOMP_WORDS=(motet data pre)\nCOMP_CWORD=2\n_shtab_motet\n"
        'echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["prepare"]


def problems(schema: dict[str, Any], values: Any) -> list[str]:
    jsonschema.Draft202012Validator.check_schema(schema)
    found = jsonschema.Draft202012Validator(schema).iter_errors(values)
    return [".".join(map(str, error.absolute_path)) for error in found]


def test_an_editor_accepts_what_we_write_and_marks_mistakes(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    schema = json.loads(main("schema", "run")[1])
    assert schema == run_schema()
    monkeypatch.chdir(tmp_path)
    assert main("init", "mine")[0] == 0
    (ours,) = tmp_path.rglob("run.yaml")
    for path in (ROOT / "examples/run.yaml", ours):
        assert problems(schema, yaml.safe_load(path.read_text())) == []
    wrong = {
        "name": "x",
        "trainig": {},
        "training": {"steps": 0, "precision": "bf61"},
        "experiments": [{"name": "a", "use": "placebo", "dose": [0]}],
    }
    assert sorted(problems(schema, wrong)) == ["", "experiments", "training"]
    written = {"name": "x", "runs": "${oc.env:SCRATCH}/runs", "seed": "${training.steps}"}
    assert problems(schema, written) == []
    assert problems(schema, {"seed": 1}) == [""]  # it has no name


GROUP = {"device": "h100", "nodes": 2, "devices_per_node": 8}
NICS = {"count": 8, "gbit_s": 400, "kind": "infiniband"}


@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({"nics": NICS}, True),
        ({"nics": NICS, "device": {"kind": "mine", "like": "h100", "memory_gib": 60}}, True),
        ({"nics": NICS, "intra_node": {"gb_s": 100, "latency_us": 3, "kind": "nvlink"}}, True),
        ({"nics": NICS, "nodes": 0}, False),
        ({"nics": NICS, "device": "h1000"}, False),
        ({"nics": {**NICS, "gbits": 1}}, False),
        ({"nics": NICS, "gpus": 8}, False),
    ],
)
def test_the_schema_of_a_cluster_agrees_with_its_reader(
    change: dict[str, Any], right: bool
) -> None:
    values = {"groups": [{**GROUP, **change}]}
    assert (problems(cluster_schema(), values) == []) == right
    if right:
        from_mapping(values)
    else:
        with pytest.raises(ClusterError):
            from_mapping(values)


def test_every_device_that_is_known_may_be_written() -> None:
    values = {"groups": [{**GROUP, "device": name, "nics": NICS} for name in DEVICES]}
    assert problems(cluster_schema(), values) == []


def test_what_was_odd_about_a_corpus_is_said_again_when_a_run_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from motet.launcher.launch import local

    found = [
        SimpleNamespace(path="corpora/a", cautions=("the end of document never occurs",)),
        SimpleNamespace(path="corpora/b", cautions=()),
    ]
    monkeypatch.setattr(local, "open_corpora", lambda _: found)
    told = local.corpus_cautions(RunSettings())
    assert told == ["corpora/a: the end of document never occurs"]
    assert "corpus_cautions" in local.prepare_run.__code__.co_names
