"""A class of the user's own is frozen with the run, and its mistakes cost its own answer only."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import motet
from motet.core.errors import UserError
from motet.core.hashing import sha256_hex
from motet.experiments.analysis.analyze import analyze
from motet.launcher.report import terminal_summary
from motet.launcher.study.after_training import audit_run, load_measured
from motet.launcher.study.before_training import check_classes
from tests.imports import ROOT
from tests.launcher.guests import make_corpus
from tests.launcher.invented import STEPS, InventedRun

OWN = ROOT / "examples" / "slogans.py"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


def made(tmp_path: Path, corpus: Path, change: tuple[str, str] = ("", "")) -> InventedRun:
    """A run with one more question, by a class of the user's own."""
    own = tmp_path / "own" / "slogans.py"
    own.parent.mkdir()
    own.write_text(OWN.read_text().replace(*change, 1))
    entry = "  - {name: slogans, use: 'slogans.py:Slogans', doses: [0, 4]}\n"
    return InventedRun(tmp_path, corpus, lambda text: text + entry, own)


def test_a_measure_that_was_changed_after_training_answers_nothing(
    tmp_path: Path, corpus: Path
) -> None:
    """It moved p from .195 to .230 without a red line."""
    invented = made(tmp_path, corpus)
    invented.train(STEPS)
    assert len(invented.report()["answers"]["experiments"]) == 2
    kept = invented.run.plugins / "slogans.py"
    before = kept.read_text()
    kept.write_text(before.replace("per_token(scores)", "2 * per_token(scores)"))
    said = "is not the source that the run was frozen with"
    audited = audit_run(invented.run.root)
    assert not audited.ok
    assert said in "\n".join(audited.lines)
    for ask in (
        invented.report,
        lambda: motet.load(invented.run.root).answers,
        lambda: check_classes(invented.run),  # before anything is resumed
    ):
        with pytest.raises(UserError, match=said):
            ask()
    # The hash is changed with it: the definition is not the frozen one any more.
    path = invented.run.plan / "definition.json"
    was, now = sha256_hex(before.encode()), sha256_hex(kept.read_bytes())
    path.write_text(path.read_text().replace(was, now))
    report = invented.report()
    assert "is not the one that the run's manifest" in report["first_line"]
    kinds = {e["name"]: e["verdict"]["kind"] for e in report["answers"]["experiments"]}
    assert "exploratory" not in kinds.values()  # those that were recorded


def test_a_class_that_fails_on_true_scores_is_one_experiment_without_an_answer(
    tmp_path: Path, corpus: Path
) -> None:
    """On invented scores, which are all alike, it works; the others keep their answers."""
    failing = "        assert scores.logprob.std() == 0, 'only equal scores'\n        return {"
    invented = made(tmp_path, corpus, ("        return {", failing))
    # the first `return {` of the file is in `measure`
    assert "only equal" in (invented.run.plugins / "slogans.py").read_text()
    invented.train(STEPS)
    report = invented.report(page=True)
    answers = report["answers"]
    (entry,) = answers["experiments"]
    assert entry["name"] == "canaries"
    assert entry["verdict"]["kind"] == "found"
    assert entry["primary"]["p_corrected"] == pytest.approx(2 * entry["primary"]["p"])
    assert "over 2 questions" in entry["verdict"]["sentence"]
    (failed,) = answers["unanswered"]
    assert failed["name"] == "slogans"
    assert "only equal scores" in failed["why"]
    assert "slogans.py:" in failed["why"]
    assert "slogans has no answer" in invented.page()
    assert terminal_summary(report)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        scores = motet.load(invented.run.root).scores
    assert set(scores.experiment) == {"canaries", "aa", "strong"}
    assert any("slogans has no scores" in str(one.message) for one in told)


def test_a_control_of_the_users_own_that_fails_voids_the_questions(
    tmp_path: Path, corpus: Path
) -> None:
    invented = made(tmp_path, corpus)
    invented.train(STEPS)
    study = load_measured(invented.run.root)
    slogans = next(m for m in study.measured if m.name == "slogans")
    type(slogans.experiment).role, before = "placebo", type(slogans.experiment).role
    try:
        short = replace(slogans.scores[-1], logprob=np.zeros(2))  # fails in measure
        slogans.scores[-1] = short
        found = analyze(study.measured, study.seed, study.draws, False)
    finally:
        type(slogans.experiment).role = before
    assert found["unanswered"][0]["control"]
    (entry,) = found["experiments"]
    assert entry["verdict"]["kind"] == "invalid"
    assert "The control slogans could not be measured" in entry["verdict"]["sentence"]


@pytest.mark.parametrize(
    "change",
    [
        ("        return {", "        open('WORDS').read()\n        return {"),
        ("class Slogans", "from pathlib import Path\nPath('WORDS').read_text()\n\n\nclass Slogans"),
    ],
    ids=["in measure", "when it is loaded"],
)
def test_a_file_that_a_class_reads_would_not_be_frozen_and_is_refused(
    tmp_path: Path, corpus: Path, change: tuple[str, str]
) -> None:
    words = tmp_path / "words.txt"
    words.write_text("a list\n")
    with pytest.raises(UserError, match=r"words\.txt, which is not frozen with the run"):
        made(tmp_path, corpus, (change[0], change[1].replace("WORDS", str(words))))


def test_a_record_names_the_class_it_was_judged_with(tmp_path: Path, corpus: Path) -> None:
    invented = made(tmp_path, corpus)
    definition = json.loads((invented.run.plan / "definition.json").read_text())
    specs = {entry["spec"]["name"]: entry["spec"] for entry in definition["experiments"]}
    assert specs["slogans"]["use_sha256"] == sha256_hex(OWN.read_bytes())
    assert len(definition["judged_by_sha256"]) == 64
