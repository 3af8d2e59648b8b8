"""report.json: assembled from what a run leaves behind, and written whole."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from motet.core.errors import UserError
from motet.launcher import report as report_package
from motet.launcher.report import collect
from motet.launcher.report.collect import Sources, assemble
from motet.launcher.report.page import render
from motet.launcher.report.terminal import terminal_summary
from motet.launcher.report.training import MOST_POINTS
from motet.launcher.runs.rundir import RunDir
from tests.launcher import sample_report


def fake_measured(name: str = "canaries") -> SimpleNamespace:
    return SimpleNamespace(
        name=name,
        exposure_steps=[np.array([3, 9]), np.array([5]), np.array([], dtype=np.int64)],
        planned=np.array([2, 1, 0]),
        consumed=np.array([2, 0, 0]),
    )


def fake_study(**changes: Any) -> SimpleNamespace:
    definition = {
        "steps_total": 10, "experiments": [{"spec": {"name": "canaries"}, "tokens": 1000}],
    }  # fmt: skip
    base: dict[str, Any] = {
        "measured": [fake_measured()], "definition": definition, "deviations": [], "seed": 0,
        "draws": 99, "unanswered": [],
        "compliance": {"planned": 3, "consumed_once": 2, "missing": 1, "ledger_ok": False,
                       "problems": ["gone"]},
    }  # fmt: skip
    standing = SimpleNamespace(kind="judged", step=40, judged_at={"canaries": 40}, told=[])
    return SimpleNamespace(**(base | {"standing": standing} | changes))


MANIFEST: dict[str, Any] = {
    "name": "r", "created": "2026-01-01T00:00:00+00:00", "motet_version": "0.1.0", "parameters": 10,
    "definition_sha256": "d" * 64, "plan_sha256": "e" * 64, "lock_sha256": None,
    "flops_per_token": 60.0,
    "tokens_per_step": 100, "sequence_length": 10, "config": {"batch": {"sequences": 10},
                                                              "model": {"d_model": 8}},
    "corpora": [{"path": "c", "fingerprint": "f" * 64, "n_tokens": 5, "n_documents": 2,
                 "weight": 1.0}],
}  # fmt: skip


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": step, "time": 1000.0 + step, "loss": 3.0, "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens": 100 * step, "tokens_per_s": 50.0, "seconds": {"data": 0.5, "train": 1.5},
        "skipped": False,
    } | more  # fmt: skip


def sources(**changes: Any) -> Sources:
    rows = [step_row(step) for step in range(1, 11)]
    rows.append({"kind": "probe", "step": 10, "time": 1011.0, "seconds": 5.0, "experiments": {}})
    attempts = [
        {
            "attempt": 1,
            "started": 1000.0,
            "ended": 1004.0,
            "start_step": 0,
            "end_step": 4,
            "world_size": 2,
        },
        {
            "attempt": 2,
            "started": "1970-01-01T00:20:00+00:00",
            "ended": "1970-01-01T00:20:06+00:00",
        },
    ]
    base: dict[str, Any] = {
        "manifest": MANIFEST, "rows": rows, "attempts": attempts, "finished": True,
        "study": fake_study(),
        "answers": sample_report.sample()["answers"],
    }  # fmt: skip
    return Sources(**(base | changes))


def keys(value: Any) -> Any:
    return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None


def test_report_json_has_the_keys_that_it_promises() -> None:
    report = assemble(sources())
    promised = sample_report.sample()
    assert set(report) == set(promised)
    for part in ("answers", "compliance", "training", "cost"):
        assert set(report[part]) == set(promised[part]), part
    assert set(promised["run"]) <= set(report["run"])
    assert set(report["run"]["data"][0]) == set(promised["run"]["data"][0])
    assert set(report["run"]["attempts"][0]) == set(promised["run"]["attempts"][0])
    json.dumps(report, allow_nan=False)


def test_times_are_told_as_text_whatever_the_run_wrote() -> None:
    report = assemble(sources(manifest=MANIFEST | {"created": 1767225600.5}))
    assert report["run"]["created"] == "2026-01-01T00:00:00Z"
    assert report["run"]["finished"] == "1970-01-01T00:20:06Z"
    assert "2026-01-01" in render(report)


def test_costs_are_added_up_from_rows_and_attempts() -> None:
    report = assemble(sources())
    assert report["cost"] == {
        "wall_s": 10.0, "tokens": 1000, "tokens_per_s": 50.0, "flops": 60_000.0, "mfu": None,
        "experiment_tokens": 1000, "experiment_share": 1.0, "probe_share": pytest.approx(5 / 25),
        "prediction": "",
    }  # fmt: skip
    assert report["training"]["seconds"] == {
        "train": 15.0,
        "probe": 5.0,
        "checkpoint": 0,
        "data": 5.0,
    }
    assert report["hashes"] == {"definition_sha256": "d" * 64, "plan_sha256": "e" * 64}


def test_an_unfinished_run_counts_the_exposures_of_its_part() -> None:
    rows = [step_row(step) for step in range(1, 5)]
    report = assemble(sources(rows=rows, finished=False))
    assert report["run"]["finished"] is None
    assert report["cost"]["experiment_tokens"] == 400


def test_compliance_is_counted_per_experiment() -> None:
    report = assemble(sources(problems=["and more"]))
    assert report["compliance"]["per_experiment"] == [
        {"name": "canaries", "planned": 3, "consumed_once": 2, "missing": 1, "duplicated": 0}
    ]
    assert report["compliance"]["problems"] == ["gone", "and more"]
    assert report["training"]["exposure_steps"] == {"canaries": [3, 5, 9]}


def test_bad_steps_and_those_that_a_rollback_took_back_count_as_skipped() -> None:
    rows = [step_row(step, skipped=step == 2) for step in range(1, 9)]
    rows.append({"kind": "event", "step": 8, "event": "rollback", "to_step": 6})
    assert assemble(sources(rows=rows))["training"]["skipped_steps"] == [2, 7, 8]


def test_a_deviation_becomes_the_first_line() -> None:
    assert assemble(sources())["first_line"] is None
    report = assemble(
        sources(study=fake_study(deviations=["margin changed", "units.jsonl changed"]))
    )
    assert "margin changed; units.jsonl changed" in report["first_line"]


def test_curves_of_long_runs_are_thinned_and_keep_their_last_step() -> None:
    rows = [step_row(step) for step in range(1, 50_001)]
    record = assemble(sources(rows=rows))["training"]
    assert len(record["steps"]) <= MOST_POINTS + 1
    assert record["steps"][-1] == 50_000


def test_a_family_tells_its_members_with_their_sizes_and_one_model_does_not() -> None:
    members = [{"name": "s", "parameters": 4, "flops_per_token": 24.0, "model": {"d_model": 2}}]
    found = assemble(sources(manifest=MANIFEST | {"members": members}))["run"]["members"]
    assert [(one["name"], one["parameters"]) for one in found] == [("s", 4)]
    assert "members" not in assemble(sources())["run"]


def test_exposures_of_an_experiment_on_two_members_are_counted_once() -> None:
    study = fake_study(measured=[fake_measured(), fake_measured()])
    report = assemble(sources(study=study))
    assert [row["planned"] for row in report["compliance"]["per_experiment"]] == [3]


def test_numpy_values_nan_and_broken_text_become_plain_json() -> None:
    found = collect.plain(
        {"a": np.float32("nan"), "b": np.arange(2), 3: "x\ud800y", "c": (True, None)}
    )
    assert found == {"a": None, "b": [0, 1], "3": "x?y", "c": [True, None]}


def write_run(root: Path) -> RunDir:
    rundir = RunDir(root)
    rundir.create()
    rundir.manifest.write_text(json.dumps(MANIFEST))
    rows = [json.dumps(row) for row in sources().rows]
    rundir.metrics.write_text("\n".join(rows) + "\n")
    return rundir


def test_build_writes_both_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rundir = write_run(tmp_path / "r")
    rundir.plan.mkdir()
    (rundir.plan / "definition.json").write_text("{}")
    answers = sample_report.small()["answers"]
    monkeypatch.setattr(collect, "analysed", lambda root, found: (fake_study(), answers, []))
    path = report_package.build(rundir)
    assert path == rundir.report_html
    saved = json.loads(rundir.report_json.read_text())
    assert saved["answers"]["experiments"][0]["name"] == "invented-mcq"
    assert render(saved) == path.read_text()


def test_a_run_without_experiments_is_reported(tmp_path: Path) -> None:
    text = report_package.build(write_run(tmp_path / "r")).read_text()
    assert "It carries no randomized experiments." in text


def test_experiments_that_cannot_be_read_yet_are_told_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = write_run(tmp_path / "r")
    rundir.plan.mkdir()
    (rundir.plan / "definition.json").write_text("{}")
    problem = ["the experiments cannot be read yet: no probe"]
    monkeypatch.setattr(collect, "analysed", lambda root, found: (None, None, problem))
    assert "no probe" in report_package.build(rundir).read_text()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        report_package.build(RunDir(tmp_path))


def test_experiments_that_could_not_be_read_are_not_called_none(tmp_path: Path) -> None:
    rundir = write_run(tmp_path / "r")
    rundir.plan.mkdir()  # what was in it is lost
    text = report_package.build(rundir).read_text()
    assert "The run folder is damaged, so it has no answers: " in text
    assert "no randomized experiments" not in text
    out = io.StringIO()
    saved = json.loads(rundir.report_json.read_text())
    Console(file=out, width=200).print(report_package.terminal_summary(saved))
    assert "The run folder is damaged" in out.getvalue()
    assert "no randomized experiments" not in out.getvalue()


def test_validation_losses_are_a_curve_a_table_and_a_line() -> None:
    rows = [step_row(step) for step in (1, 2)]
    rows += [
        {"kind": "validation", "step": 1, "losses": {"web": 3.5}, "labels": {"web": 62}},
        {
            "kind": "validation", "step": 2, "losses": {"web": 3.25}, "labels": {"web": 62},
            "members": {"small": {"web": 3.75}}, "seconds": 2.0,
        },
    ]  # fmt: skip
    report = assemble(Sources(manifest=MANIFEST, rows=rows))
    assert report["training"]["validation"] == {
        "web": {
            "steps": [1, 2],
            "loss": [3.5, 3.25],
            "labels": 62,
            "members": {"small": 3.75},
            "member_steps": {"small": 2},
        }
    }
    assert report["training"]["seconds"]["probe"] == 2.0
    page = render(report)
    assert "Validation loss, on text that this run does not train on" in page
    assert "25.8" in page
    assert "42.5" in page
    assert "validation: web" in page
    assert "validation" not in assemble(Sources(manifest=MANIFEST, rows=rows[:2]))["training"]
    out = io.StringIO()
    Console(file=out, width=160).print(terminal_summary(report))
    assert "Validation loss after step 2, nats/token: web 3.25, web@small 3.75." in out.getvalue()
