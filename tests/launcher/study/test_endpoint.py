"""The primary outcome is judged at the frozen step and at no other, however the run goes on."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import motet
from motet.core.errors import UserError
from motet.core.hashing import canonical_json, sha256_hex
from motet.launcher.report import terminal_summary
from tests.launcher.guests import make_corpus
from tests.launcher.invented import STEPS, InventedRun, gain


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def invented(tmp_path: Path, corpus: Path) -> InventedRun:
    return InventedRun(tmp_path, corpus)


def fades(name: str, step: int) -> float:
    """An effect that is there at the judged step and gone later."""
    return gain(name, step) if step <= STEPS or name != "canaries" else 0.0


def grows(name: str, step: int) -> float:
    """An effect of which nothing is there at the judged step."""
    return gain(name, step) if step > STEPS or name != "canaries" else 0.0


def canaries(report: dict[str, Any]) -> dict[str, Any]:
    (entry,) = report["answers"]["experiments"]
    return dict(entry)


def first_words(report: dict[str, Any]) -> str:
    """The first line that a terminal shows."""
    from rich.console import Console

    console = Console(width=10_000, color_system=None)
    with console.capture() as captured:
        console.print(terminal_summary(report))
    return captured.get().splitlines()[0]


def assert_told_first(run: InventedRun, report: dict[str, Any], said: str) -> None:
    """In report.json and the terminal, and on the page where one was made."""
    assert said in report["first_line"]
    assert said in first_words(report)
    if not run.run.report_html.exists():
        return
    body = run.page().partition("<body")[2]
    assert said in re.sub(r"<[^>]+>", " ", body.partition("<h1>")[0]).replace("&#39;", "'")


def test_the_definition_holds_the_step_of_judgement(invented: InventedRun) -> None:
    definition = json.loads((invented.run.plan / "definition.json").read_text())
    assert {entry["judged_at_step"] for entry in definition["experiments"]} == {STEPS}
    assert all("judge_at" not in entry["spec"] for entry in definition["experiments"])
    assert definition["analysis"]["alpha"] == 0.05


def test_a_run_that_ends_where_it_was_frozen_to_end_is_judged(invented: InventedRun) -> None:
    invented.train(STEPS)
    report = invented.report()
    assert report["first_line"] is None
    assert report["standing"]["kind"] == "judged"
    assert canaries(report)["verdict"]["kind"] == "found"
    assert "exploratory" not in canaries(report)


@pytest.mark.parametrize("later", [fades, grows])
def test_a_run_that_was_extended_keeps_its_judgement_and_shows_the_rest_as_exploratory(
    invented: InventedRun, later: Callable[[str, int], float]
) -> None:
    """A canary run of 80 steps was "not valid", and another answer after `resume
    training.steps=160`, without a word.
    """
    invented.train(STEPS, gained=later)
    before = invented.report()
    invented.train(2 * STEPS, STEPS, ["training.steps=80"], gained=later)
    after = invented.report(page=True)
    assert_told_first(invented, after, "Judged at step 40, as frozen; the run went on to step 80")
    for name in ("primary", "secondary", "verdict"):
        assert canaries(after)[name] == canaries(before)[name]
    assert after["answers"]["controls"] == {
        name: control | {"exploratory": after["answers"]["controls"][name]["exploratory"]}
        for name, control in before["answers"]["controls"].items()
    }
    (more,) = canaries(after)["exploratory"]
    assert more["step"] == 2 * STEPS
    assert more["primary"]["effect"] != canaries(after)["primary"]["effect"]
    assert canaries(after)["verdict"]["kind"] == ("found" if later is fades else "not_found")
    assert (more["primary"]["p"] < 0.01) == (later is grows)
    assert invented.page().count('<span class="verdict found">') == (4 if later is fades else 2)
    assert "Exploratory, step 80" in invented.page()


def test_a_run_that_was_extended_twice_is_judged_as_before_without_an_earlier_report(
    invented: InventedRun,
) -> None:
    invented.train(STEPS, gained=fades)
    invented.train(60, STEPS, ["training.steps=60"], gained=fades)
    invented.train(80, 60, ["training.steps=80"], gained=fades)
    report = invented.report()
    assert canaries(report)["verdict"]["kind"] == "found"
    assert canaries(report)["exploratory"][0]["step"] == 80
    frame = motet.load(invented.run.root).answers
    rows = frame[(frame.experiment == "canaries") & frame.verdict.notna()]
    assert rows.verdict.tolist() == ["found", "exploratory"]
    assert motet.load(invented.run.root).scores.step.max() == 80


@pytest.mark.parametrize("stop", [10, 30])
def test_before_its_step_a_run_has_no_verdict(invented: InventedRun, stop: int) -> None:
    """Stopping at the first p <= .05 of 8 looks finds 13 to 21 % of nothing."""
    invented.train(stop)
    report = invented.report(page=stop == 30)
    said = f"Interim: it is judged at step 40, and the run stands at step {stop}"
    assert_told_first(invented, report, said)
    entry = canaries(report)
    assert entry["verdict"]["kind"] == "interim"
    assert "No verdict" in entry["verdict"]["sentence"]
    controls = report["answers"]["controls"].values()
    assert [control["verdict"]["kind"] for control in controls] == ["interim", "interim"]
    assert [control["ok"] for control in controls] == [None, None]
    assert stop != 30 or "verdict found" not in invented.page()
    assert not invented.run.judgement.exists()
    frame = motet.load(invented.run.root).answers
    assert set(frame.verdict.dropna()) == {"interim"}


def test_a_run_that_was_extended_before_its_step_is_another_run(invented: InventedRun) -> None:
    """The learning rate of a schedule that falls to the end is another at the judged step."""
    invented.train(20)
    invented.train(2 * STEPS, 20, ["training.steps=80"])
    report = invented.report(page=True)
    assert_told_first(invented, report, "made 80 steps long instead of 40 before step 40")
    assert "No verdict is given" in report["first_line"]
    assert canaries(report)["verdict"]["kind"] == "exploratory"
    assert "verdict found" not in invented.page()
    assert not invented.run.judgement.exists()


def test_under_a_constant_learning_rate_extending_early_changes_nothing_before_the_step(
    tmp_path: Path, corpus: Path
) -> None:
    invented = InventedRun(tmp_path, corpus, lambda text: text.replace("cosine", "constant"))
    invented.train(20)
    invented.train(2 * STEPS, 20, ["training.steps=80"])
    report = invented.report()
    assert canaries(report)["verdict"]["kind"] == "found"
    assert "Judged at step 40" in report["first_line"]


@pytest.mark.parametrize(
    "override", ["training.bad_steps.spike_sigma=2", "training.schedule.final_lr_fraction=0.5"]
)
def test_a_setting_that_moves_the_weights_before_the_step_is_told(
    invented: InventedRun, override: str
) -> None:
    invented.train(20)
    invented.train(STEPS, 20, [override])
    report = invented.report()
    name = override.partition("=")[0]
    assert_told_first(invented, report, f"{name} was")
    assert canaries(report)["verdict"]["kind"] == "exploratory"


def test_such_a_setting_after_the_step_changes_no_judgement(invented: InventedRun) -> None:
    invented.train(STEPS)
    changed = ["training.steps=60", "training.bad_steps.spike_sigma=2"]
    invented.train(60, STEPS, changed)
    assert canaries(invented.report())["verdict"]["kind"] == "found"


def test_a_run_that_was_taken_back_is_judged_by_the_first_time_it_got_there(
    invented: InventedRun,
) -> None:
    """Not even a report was made: the probes of the first time are kept."""
    invented.train(20)
    invented.train(STEPS, 20, gained=fades)
    invented.train(20)  # from the start again, and nothing is found this time
    invented.train(STEPS, 20, gained=lambda name, step: 0.0 if name == "canaries" else 3.0)
    report = invented.report()
    assert_told_first(invented, report, "taken back behind step 40")
    assert canaries(report)["verdict"]["kind"] == "found"
    (more,) = canaries(report)["exploratory"]
    assert more["primary"]["p"] > 0.05


@pytest.mark.parametrize(("name", "value"), [("draws", 200), ("alpha", 0.1)])
def test_a_judgement_under_an_altered_definition_is_exploratory_and_the_first_one_stays(
    invented: InventedRun, name: str, value: float
) -> None:
    invented.train(STEPS, gained=lambda n, s: 0.0 if n == "canaries" else 3.0)
    path = invented.run.plan / "definition.json"
    frozen = path.read_text()

    def alter() -> None:
        content = json.loads(frozen)
        content["analysis"][name] = value
        if name == "alpha":
            for entry in content["experiments"]:
                entry["spec"]["alpha"] = value
        path.write_text(canonical_json(content))

    alter()
    unjudged = invented.report()
    assert_told_first(invented, unjudged, "is not the one that")
    assert canaries(unjudged)["verdict"]["kind"] == "exploratory"
    assert not invented.run.judgement.exists()
    path.write_text(frozen)
    first = invented.report()
    kept = invented.run.judgement.read_bytes()
    alter()
    again = invented.report()
    assert "is not the one that" in again["first_line"]
    assert canaries(again)["verdict"] == canaries(first)["verdict"]
    assert canaries(again)["primary"] == canaries(first)["primary"]
    assert invented.run.judgement.read_bytes() == kept


def test_another_version_of_the_analysis_says_so_and_the_first_judgement_stays(
    invented: InventedRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher.study import deviations, judgement

    invented.train(STEPS)
    first = invented.report()
    monkeypatch.setattr(deviations, "judging_sha256", lambda: "0" * 64)
    same = invented.report()
    assert "analysis is not the one" in same["first_line"]
    assert canaries(same) == canaries(first)

    def bolder(*arguments: Any, **named: Any) -> dict[str, Any]:
        answers = real(*arguments, **named)
        answers["experiments"][0]["primary"]["effect"] *= 2
        return answers

    real = judgement.analyze
    monkeypatch.setattr(judgement, "analyze", bolder)
    other = invented.report()
    assert_told_first(invented, other, "what is computed now differs for canaries")
    assert canaries(other)["primary"] == canaries(first)["primary"]
    assert canaries(other)["verdict"] == canaries(first)["verdict"]
    (more,) = canaries(other)["exploratory"]
    assert more["primary"]["effect"] == 2 * canaries(first)["primary"]["effect"]
    invented.run.judgement.unlink()
    alone = invented.report()
    assert canaries(alone)["verdict"]["kind"] == "exploratory"
    assert not invented.run.judgement.exists()


def test_a_recorded_judgement_that_was_altered_is_left_aside_and_told(
    invented: InventedRun,
) -> None:
    invented.train(STEPS)
    invented.report()
    path = invented.run.judgement
    path.write_text(path.read_text().replace('"found"', '"not_found"'))
    report = invented.report()
    assert "judgement.json was altered" in report["first_line"]
    assert canaries(report)["verdict"]["kind"] == "found"


@pytest.mark.parametrize(
    "change",
    [
        {"version": 2},
        {"answers": None},
        {"answers": {}},
        {"answers": {"experiments": [{}], "controls": {}}},
        {"definition_sha256": None},
    ],
    ids=str,
)
def test_a_whole_record_of_another_shape_is_left_aside_and_told(
    invented: InventedRun, change: dict[str, Any]
) -> None:
    """Another version of Motet may have written it; its hash holds."""
    invented.train(STEPS)
    invented.report()
    content = json.loads(invented.run.judgement.read_text()) | change
    content.pop("sha256")
    content = {name: value for name, value in content.items() if value is not None}
    whole = content | {"sha256": sha256_hex(canonical_json(content))}
    invented.run.judgement.write_text(json.dumps(whole))
    report = invented.report()
    assert "judgement.json is none that this Motet wrote" in report["first_line"]
    assert canaries(report)["verdict"]["kind"] == "found"


def test_a_run_that_was_shortened_says_so_and_has_no_verdict(invented: InventedRun) -> None:
    invented.train(20, overrides=["training.steps=20"])
    report = invented.report()
    said = "the run stands at step 20, shortened to 20 steps: it ends before it can be judged"
    assert_told_first(invented, report, said)
    assert canaries(report)["verdict"]["kind"] == "interim"
    invented.train(STEPS, 20, ["training.steps=40"])
    assert_told_first(invented, invented.report(), "was made 20 steps long instead of 40")


def judged_earlier(text: str) -> str:
    return text.replace("use: memorization,", "use: memorization, judge_at: 0.5,")


def test_an_experiment_may_be_judged_earlier_once_its_controls_are(
    tmp_path: Path, corpus: Path
) -> None:
    invented = InventedRun(tmp_path, corpus, judged_earlier)
    definition = json.loads((invented.run.plan / "definition.json").read_text())
    judged = {e["spec"]["name"]: e["judged_at_step"] for e in definition["experiments"]}
    assert judged == {"canaries": 20, "aa": 40, "strong": 40}
    invented.train(30)
    assert canaries(invented.report())["verdict"]["kind"] == "interim"
    late = lambda name, step: 0.0 if name == "canaries" and step <= 20 else gain(name, step)  # noqa: E731
    invented.train(STEPS, 30, gained=late)
    report = invented.report()
    assert report["first_line"] is None
    entry = canaries(report)
    assert entry["verdict"]["kind"] in ("found", "invalid")
    planned = [arm["planned_exposures"] for arm in entry["arms"]]
    assert planned[1] == entry["arms"][1]["consumed_exposures"] < 2 * entry["arms"][1]["n_units"]
    assert entry["exploratory"][0]["step"] == STEPS


@pytest.mark.parametrize(("asked", "said"), [("0", "a step >= 1"), ("41", "the run ends after")])
def test_a_step_of_judgement_outside_the_run_is_refused(
    tmp_path: Path, corpus: Path, asked: str, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        InventedRun(tmp_path, corpus, lambda t: judged_earlier(t).replace("0.5,", f"{asked},"))


NESTED = """
model: {preset: 1m, d_model: 32, n_layers: 2, n_heads: 2, n_kv_heads: 1, d_ffn: 64, head_dim: 16}
family: {kind: nested, options: {members: {small: {d_ffn: 0.5}}, sampler: joint, draws: 1}}
"""


def at_whole(text: str) -> str:
    return text + NESTED


def at_small(text: str) -> str:
    return at_whole(text).replace("use: memorization,", "use: memorization, member: small,")


@pytest.mark.parametrize("asked", [at_whole, at_small], ids=["whole", "small"])
def test_the_answer_at_a_member_is_judged_as_frozen_when_the_run_is_extended(
    tmp_path: Path, corpus: Path, asked: Callable[[str], str]
) -> None:
    invented = InventedRun(tmp_path, corpus, asked)
    invented.train(STEPS, gained=fades)
    before = invented.report()
    assert canaries(before)["verdict"]["kind"] == "found"
    assert before["first_line"] is None
    invented.train(2 * STEPS, STEPS, ["training.steps=80"], gained=fades)
    after = invented.report()
    assert_told_first(invented, after, "Judged at step 40, as frozen; the run went on to step 80")
    for name in ("member", "primary", "secondary", "verdict", "members"):
        assert canaries(after)[name] == canaries(before)[name], name
    (more,) = canaries(after)["exploratory"]
    assert (more["step"], more["primary"]["p"] > 0.05) == (2 * STEPS, True)
    where = " of member small" if asked is at_small else ""
    assert ("of member small" in more["sentence"]) == bool(where)


@pytest.mark.parametrize(
    ("edit", "facts"), [(at_whole, {}), (str, {"guest": True})], ids=["family", "guest"]
)
def test_a_family_or_a_guest_that_was_extended_before_its_step_is_another_run(
    tmp_path: Path, corpus: Path, edit: Callable[[str], str], facts: dict[str, Any]
) -> None:
    """Even under a constant learning rate: stages of a family, and what somebody else's loop does
    with its length, are not known here.
    """
    constant = lambda text: edit(text.replace("kind: cosine", "kind: constant"))  # noqa: E731
    invented = InventedRun(tmp_path, corpus, constant, facts=facts)
    invented.train(30)
    invented.train(2 * STEPS, 30, ["training.steps=80"])
    report = invented.report()
    said = "the run was made 80 steps long instead of 40 before step 40 of its judgement"
    assert_told_first(invented, report, said)
    assert canaries(report)["verdict"]["kind"] == "exploratory"
    assert not invented.run.judgement.exists()


def test_the_first_line_names_a_command_that_judges_by_the_runs_own_code(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Any later edit of the analysis would else leave a run that was never reported on without a
    verdict. The folder has a space in its name, as folders may.
    """
    from motet.launcher.study import deviations

    folder = tmp_path / "my runs"
    folder.mkdir()
    invented = InventedRun(folder, corpus)
    invented.train(STEPS)
    monkeypatch.setattr(deviations, "judging_sha256", lambda: "0" * 64)
    report = invented.report()
    assert canaries(report)["verdict"]["kind"] == "exploratory"
    typed = re.search(r"PYTHONPATH=.* motet report .*?(?= \(once)", report["first_line"])
    assert typed is not None
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "PYTHONPATH": ""}
    words = ["sh", "-c", f"{typed[0]} --json"]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    own = json.loads(done.stdout)
    assert own["first_line"] is None
    assert canaries(own)["verdict"]["kind"] == "found"
    again = invented.report()  # by the other code, the verdict of then stays
    assert canaries(again)["verdict"] == canaries(own)["verdict"]
    shutil.rmtree(invented.run.code)
    assert "its own is no longer in the run's folder" in invented.report()["first_line"]


def test_minus_and_percent_are_written_in_one_way_on_a_page(tmp_path: Path, corpus: Path) -> None:
    """A drop, among controls, curves and settings."""
    falls = lambda name, step: -gain(name, step) if name == "canaries" else gain(name, step)  # noqa: E731
    invented = InventedRun(tmp_path, corpus)
    invented.train(STEPS, gained=falls)
    report = invented.report(page=True)
    told = canaries(report)["verdict"]["sentence"]
    assert re.search(r"95 % interval \u2212[0-9.]+ to", told), told
    text = re.sub(r"<(style|script|pre)\b.*?</\1>|<[^>]+>", " ", invented.page(), flags=re.S)
    assert re.findall(r".{20}[0-9]%.{20}", text) == []
    assert re.findall(r".{20}(?<![\w.:/-])-[0-9][0-9.]*(?![-\w]).{20}", text) == []


def test_the_hash_of_a_record_is_of_its_content(invented: InventedRun) -> None:
    invented.train(STEPS)
    invented.report()
    content = json.loads(invented.run.judgement.read_text())
    assert content.pop("sha256") == sha256_hex(canonical_json(content))
    assert content["judged_at"]["canaries"] == STEPS
