"""A run folder as data frames: what `motet.load` gives, and what it refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import motet
from motet.experiments.analysis.analyze import analyze
from motet.launcher.report import frames
from motet.launcher.report.loaded import LoadedRun, load, load_runs
from tests.experiments.analysis.test_analysis import CONTROLS, QUESTIONS, measured
from tests.kept_runs import unpack


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("kept"))


@pytest.fixture(scope="module")
def run(kept: Path) -> LoadedRun:
    return load(kept / "runs" / "finished")


def test_metrics_are_one_row_a_step(run: LoadedRun) -> None:
    steps = run.metrics
    assert steps.step.tolist() == list(range(1, 161))
    assert steps.loss.iloc[-1] < steps.loss.iloc[0]
    assert {"lr", "tokens", "seconds.train"} <= set(steps.columns)
    assert run.rows("checkpoint").step.max() == 160
    with pytest.raises(motet.UserError, match="kind='steps' is no kind of row; there are attempt"):
        run.rows("steps")


def test_units_tell_their_arm_dose_cluster_and_block(run: LoadedRun) -> None:
    units = run.units
    assert units.groupby("experiment").size().to_dict() == {
        "canaries": 12, "aa-placebo": 64, "positive-control": 16,
    }  # fmt: skip
    canaries = units[units.experiment == "canaries"]
    assert canaries.groupby("dose").size().to_dict() == {0.0: 6, 2.0: 6}
    assert canaries.unit.is_unique
    assert not units[["arm", "cluster", "role"]].isna().any().any()


def test_scores_can_be_joined_with_units_and_give_the_means_of_the_answers(run: LoadedRun) -> None:
    joined = run.scores.merge(run.units, on=["experiment", "unit"], validate="many_to_one")
    assert len(joined) == len(run.scores)
    assert set(joined.member) == {"whole"}
    last = joined[(joined.step == joined.step.max()) & (joined.experiment == "canaries")]
    means = last[last.series == "exposure"].groupby("dose").value.mean()
    primary = run.answers[run.answers.primary & (run.answers.experiment == "canaries")].iloc[0]
    assert means[0.0] == pytest.approx(primary.control_mean)
    assert means[2.0] == pytest.approx(primary.treated_mean)


def test_items_hold_every_probe_item_at_every_probed_step(run: LoadedRun) -> None:
    counts = run.items.groupby(["experiment", "step"]).size()
    assert counts.groupby("experiment").nunique().eq(1).all()
    assert set(run.items.step) == set(run.scores.step)
    assert run.items.logprob.lt(0).all()
    assert run.items.tokens.gt(0).all()


def test_answers_are_those_of_the_report(run: LoadedRun, kept: Path) -> None:
    report = json.loads((kept / "report.json").read_text(encoding="utf-8"))
    by_name = {entry["name"]: entry for entry in report["answers"]["experiments"]}
    for row in run.answers[run.answers.role == "question"].to_dict("records"):
        entry = by_name[row["experiment"]]
        outcomes = [entry["primary"], *entry["secondary"]]
        outcome = next(o for o in outcomes if o["name"] == row["outcome"])
        for name in ("effect", "low", "high", "p", "p_corrected", "n"):
            assert row[name] == pytest.approx(outcome[name], nan_ok=True)
        # An old run has no frozen step, and how small an effect would have been found was a formula.
        # Its report wrote minus and percent in another way.
        old = entry["verdict"]["sentence"].replace("95%", "95 %").replace(" -", " \u2212")
        both = (str(row["sentence"]), old)
        said, then = (text.split(": ", 1)[-1].split(". ")[0].rstrip(".") for text in both)
        assert not row["primary"] or said == then


def test_settings_are_those_of_the_run(run: LoadedRun) -> None:
    assert run.settings["training"]["steps"] == 160
    assert run.manifest["parameters"] > 0
    assert run.name == "finished"
    assert repr(run) == f"motet.load({str(run.path)!r})"


def test_several_runs_lie_below_each_other(kept: Path) -> None:
    runs = load_runs(kept / "runs")
    assert [run.name for run in runs] == ["finished", "stopped"]
    assert len(runs) == 2
    assert runs.units.groupby("run").size().to_dict() == {"finished": 92, "stopped": 92}
    assert runs.metrics.columns[0] == "run"
    listed = load_runs([kept / "runs" / "stopped"])
    assert set(listed.metrics.run) == {"stopped"}


def test_what_is_no_run_is_one_error(tmp_path: Path, kept: Path) -> None:
    with pytest.raises(motet.UserError, match="nowhere does not exist"):
        motet.load(tmp_path / "nowhere")
    with pytest.raises(motet.UserError, match=r"is not the folder of a run: it has no resolved"):
        motet.load(tmp_path)
    (tmp_path / "resolved.yaml").write_text("name: r\n")
    with pytest.raises(motet.UserError, match=r"manifest.json does not exist"):
        motet.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(motet.UserError, match=r"manifest.json cannot be read as JSON"):
        motet.load(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(motet.UserError, match=r"manifest.json is not the manifest of a run"):
        motet.load(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "resolved.yaml").write_text("a: [")
    with pytest.raises(motet.UserError, match=r"resolved.yaml cannot be read"):
        assert motet.load(tmp_path).settings
    with pytest.raises(motet.UserError, match="holds no run"):
        motet.load_runs(kept / "corpus")
    with pytest.raises(motet.UserError, match="does not exist"):
        motet.load_runs(tmp_path / "nowhere")


def test_a_run_that_just_began_has_units_and_says_that_it_has_no_answers(
    kept: Path, tmp_path: Path
) -> None:
    young = tmp_path / "young"
    shutil.copytree(kept / "runs" / "stopped", young)
    shutil.rmtree(young / "checkpoints")
    run = motet.load(young)
    assert len(run.units) == 92
    with pytest.raises(motet.UserError, match="has no checkpoint yet"):
        assert run.answers


def test_a_run_without_experiments_has_frames_without_rows(tmp_path: Path) -> None:
    (tmp_path / "resolved.yaml").write_text("name: r\n")
    (tmp_path / "manifest.json").write_text('{"name": "r"}')
    run = motet.load(tmp_path)
    for name, columns in (
        ("units", frames.UNIT_COLUMNS),
        ("scores", frames.SCORE_COLUMNS),
        ("items", frames.ITEM_COLUMNS),
        ("answers", frames.ANSWER_COLUMNS),
    ):
        frame = getattr(run, name)
        assert len(frame) == 0
        assert list(frame.columns) == list(columns)
    assert len(run.metrics) == 0


def test_members_have_rows_of_their_own() -> None:
    one = measured(QUESTIONS[0])
    pair = [one, replace(one, member="small")]
    scores = frames.scores(pair)
    assert scores.groupby("member").size().nunique() == 1
    assert set(scores.member) == {"whole", "small"}
    assert set(frames.items(pair).member) == {"whole", "small"}
    found: dict[str, Any] = analyze([*pair, measured(CONTROLS[0])], 0, 99, details=False)
    answers = frames.answers(found)
    canaries = answers[answers.experiment == "canaries"]
    assert canaries.primary.sum() == 1
    assert canaries[canaries.primary].member.tolist() == ["whole"]
    small = canaries[canaries.member == "small"]
    assert len(small) == len(canaries) / 2
    assert np.allclose(small.p_corrected.max(), answers[~answers.primary].p_corrected.max())
