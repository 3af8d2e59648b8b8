"""Damage beside the files that a run is made of: corpora, exported models, records of jobs and what
commands leave in a run folder for others. No command ends in a traceback, and none answers
otherwise than before without naming the file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from motet.core.files import read_json, write_json
from motet.core.hashing import sha256_file
from motet.launcher.runs.job_files import write_jobs
from motet.launcher.runs.listed import seal
from motet.launcher.runs.rundir import RunDir
from motet.launcher.runs.seals import read_manifest
from motet.models.config import ModelConfig
from tests.launcher.invented import RUN_YAML, STEPS, InventedRun
from tests.launcher.runs.test_verify import (
    HOW,
    VOLATILE,
    damage,
    neighbour,
    no_ranks,
    said,
    weights_of,
    whole,
)

__all__ = ["no_ranks", "weights_of", "whole"]
Commands = Mapping[str, tuple[str, ...]]


def faults(
    name: str,
    path: Path,
    commands: Commands,
    told: Mapping[str, tuple[int, str]],
    how: str,
) -> list[str]:
    """Damage a file in one way, give the commands, put it back: tracebacks and silent changes."""
    other = neighbour(path) if how == "swapped" else None
    before = {one: one.read_bytes() for one in (path, other) if one is not None}
    damage(path, how)
    found = []
    if any(one.read_bytes() != content for one, content in before.items()):
        for command, words in commands.items():
            try:
                code, text = answer(words)
            except Exception as error:
                found.append(f"{name}, {how}, {command}: {type(error).__name__}: {error}")
                continue
            named = any(one.name in text for one in before)
            unseen = command == "verify" and (code == 0 or not named)
            if "Traceback" in text or unseen or ((code, text) != told[command] and not named):
                found.append(f"{name}, {how}, {command}: {code}, {text[:400]!r}")
    for one, content in before.items():
        one.write_bytes(content)
    return found


def answer(words: Sequence[str]) -> tuple[int, str]:
    """Exit code and words of a command; of an export also what it wrote, which is taken away."""
    code, text = said(*words)
    if words[0] == "export":
        out = Path(words[words.index("--output") + 1])
        wrote = [path for path in out.rglob("*") if path.suffix in (".json", ".safetensors")]
        text += str(sorted((path.name, sha256_file(path)) for path in wrote))
        shutil.rmtree(out, ignore_errors=True)
    return code, VOLATILE.sub("", " ".join(text.split()))


def swept(files: Sequence[Path], commands: Commands, every: bool, ways: int = 5) -> list[str]:
    """Damage every file in every way; without `every`, in so many `ways`, and the commands take
    turns, one way of each file, but for `verify`, which sees all of it.
    """
    told = {command: answer(words) for command, words in commands.items()}
    assert not any(code for code, _ in told.values()), told
    found = []
    for number, path in enumerate(files):
        for turn, how in enumerate(HOW):
            if not every and (turn - number) % len(HOW) >= ways:
                continue
            others = [name for name in commands if name != "verify"]
            turns = others[number % len(others)] if turn == number % len(HOW) else "verify"
            names = commands if every else {"verify", turns}
            mine = {name: words for name, words in commands.items() if name in names}
            found += faults(path.name, path, mine, told, how)
    return found


EVERY = pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.long)])


@pytest.fixture
def corpus(whole: Path, tmp_path: Path) -> Path:
    facts = read_json(RunDir(whole).manifest)
    source = Path(facts["config"]["data"]["corpora"][0]["path"])
    shutil.copytree(source, tmp_path / "corpus")
    return tmp_path / "corpus"


@EVERY
def test_damage_to_a_corpus(corpus: Path, tmp_path: Path, every: bool) -> None:
    yaml = tmp_path / "r.yaml"
    yaml.write_text(RUN_YAML.format(corpus=corpus))
    commands = {
        "verify": ("data", "inspect", str(corpus), "--verify"),
        "inspect": ("data", "inspect", str(corpus)),
        "sample": ("data", "sample", str(corpus), "--count", "3", "--output", str(tmp_path / "items.jsonl")),
        "dry run": ("train", str(yaml), "--dry-run"),
        "check": ("experiments", "check", str(yaml)),
    }  # fmt: skip
    files = [path for path in sorted(corpus.rglob("*")) if path.is_file()]
    found = swept(files, commands, every)
    assert not found, "\n".join(found)


@pytest.fixture
def run(whole: Path, tmp_path: Path) -> RunDir:
    root = tmp_path / "runs" / "r"
    shutil.copytree(whole, root)
    return RunDir(root)


@EVERY
def test_damage_to_what_lies_beside_the_tokens_of_a_run(
    run: RunDir, tmp_path: Path, every: bool
) -> None:
    """Of the corpus itself: an exported model takes its tokenizer from there."""
    corpus = Path(read_json(run.manifest)["config"]["data"]["corpora"][0]["path"])
    commands = {
        "verify": ("verify", str(run.root)),
        "export": ("export", str(run.root), "--output", str(tmp_path / "exported")),
    }
    names = ("corpus.json", "tokenizer.json", "tokenizer_config.json", "prepare.json")
    found = swept([corpus / name for name in names], commands, every)
    assert not found, "\n".join(found)


NESTED = """
model: {preset: 1m, d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 1, d_ffn: 32, head_dim: 8}
family: {kind: nested, options: {members: {small: {d_ffn: 0.5}}, sampler: joint, draws: 1}}
"""


@EVERY
def test_damage_to_the_models_of_a_family_and_to_their_benchmarks(
    corpus: Path, tmp_path: Path, every: bool
) -> None:
    """Each member's folder as `motet export` leaves it, and the results of `motet eval`."""
    (tmp_path / "family").mkdir()
    few = lambda text: text.replace("draws: 400", "draws: 100") + NESTED  # noqa: E731
    invented = InventedRun(tmp_path / "family", corpus, few)
    run = invented.run
    model = ModelConfig(**read_manifest(run)["model"])
    invented.logs, invented.weights = True, weights_of(model)
    invented.train(STEPS)
    code, text = said("export", "--all", str(run.root))
    assert code == 0, text
    members = sorted(path for path in run.members.iterdir())
    assert [path.name for path in members] == ["step-00000040", "step-00000040@small"]
    commands = {"verify": ("verify", str(run.root)), "report": ("report", "--json", str(run.root))}
    for number, folder in enumerate(members):
        results = run.evaluations / folder.name / "model"
        results.mkdir(parents=True)
        found = {"task": {"acc,none": 0.25 + number / 4, "acc_stderr,none": 0.1}}
        (results / "results_2026-01-01.json").write_text(json.dumps({"results": found}))
        seal(results.parent, run, STEPS)
        yaml = tmp_path / f"next-{number}.yaml"
        begins = f"name: next\nmodel: {{from_hf: {folder}}}"
        yaml.write_text(RUN_YAML.format(corpus=corpus).replace("name: r", begins))
        commands[f"go on from {folder.name}"] = ("train", str(yaml), "--dry-run")
    files = [path for path in sorted(run.members.rglob("*")) if path.is_file()]
    files += [path for path in sorted(run.evaluations.rglob("*")) if path.is_file()]
    assert len(files) >= 16, files
    lost = swept(files, commands, every, ways=1)
    assert not lost, "\n".join(lost)


@EVERY
def test_damage_to_an_exported_model(
    run: RunDir, corpus: Path, tmp_path: Path, every: bool
) -> None:
    exported = run.members / "whole"
    code, text = said("export", str(run.root), "--output", str(exported))
    assert code == 0, text
    yaml = tmp_path / "next.yaml"
    text = RUN_YAML.format(corpus=corpus).replace(
        "name: r", f"name: next\nmodel: {{from_hf: {exported}}}"
    )
    yaml.write_text(text)
    commands = {
        "verify": ("verify", str(run.root)),
        "go on from it": ("train", str(yaml), "--dry-run"),
    }
    files = [path for path in sorted(exported.rglob("*")) if path.is_file()]
    assert len(files) >= 4, files
    found = swept(files, commands, every)
    assert not found, "\n".join(found)


@EVERY
def test_damage_to_what_was_submitted(run: RunDir, every: bool) -> None:
    run.job_files.mkdir()
    write_jobs(run, [{"job_id": "7", "submitted": 1.0}])
    write_json(run.job_begun, {"job_id": "7", "restarts": 0, "attempt": 1, "step": 20})
    write_json(run.job_command, {"since_attempt": 1})
    run.job_script.write_text("#!/bin/bash\ntrue\n")
    commands = {
        "status": ("status", str(run.root), "--json"),
        "logs": ("logs", str(run.root)),
        "resume": ("resume", str(run.root)),
        "cancel": ("cancel", str(run.root), "--dry-run"),
    }
    files = [run.jobs_json, run.job_begun, run.job_command, run.job_script]
    found = swept(files, commands, every)
    assert not found, "\n".join(found)
