"""A run of several members, from its probe files to the report: made of a kept run of one model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

import motet
from motet.launcher.runs.rundir import RunDir
from motet.launcher.study.after_training import load_measured
from tests.kept_runs import unpack
from tests.launcher.conftest import Main

MEMBERS = [
    {"name": "small", "parameters": 4_000, "parameters_non_embedding": 1_000},
    {"name": "medium", "parameters": 9_000, "parameters_non_embedding": 5_000},
]


def add_member(run: RunDir, name: str, gain: float) -> None:
    """A member that scores as the whole model does, and a held-back `gain` more in every treated
    unit's items once it was shown.
    """
    study = load_measured(run.root)
    for path in sorted(run.probes.glob("step-*.npz")):
        with np.load(path) as file:
            arrays: dict[str, Any] = {key: file[key] for key in file.files}
        step = json.loads(arrays["facts"].tobytes())["step"]
        for m in study.measured:
            if f"{m.name}/logprob" not in arrays:
                continue
            shown = np.array([len(when) > 0 and when[0] < step for when in m.exposure_steps])
            counts = [len(unit.items) for unit in m.units]
            first = np.repeat(shown, counts) & first_items(counts)
            for part in ("logprob", "n_tokens", "n_bytes", "greedy"):
                arrays[f"{m.name}@{name}/{part}"] = arrays[f"{m.name}/{part}"]
            arrays[f"{m.name}@{name}/logprob"] = arrays[f"{m.name}/logprob"] + gain * first
        np.savez(path, **arrays)


def first_items(counts: list[int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which items are the first of their unit: the secret itself, before its references."""
    starts = np.cumsum([0, *counts[:-1]])
    return np.isin(np.arange(sum(counts)), starts)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> RunDir:
    run = RunDir(unpack(tmp_path_factory.mktemp("family")) / "runs" / "finished")
    add_member(run, "small", 0.0)
    add_member(run, "medium", 9.0)
    manifest = json.loads(run.manifest.read_text(encoding="utf-8"))
    run.manifest.write_text(json.dumps(manifest | {"members": MEMBERS}))
    return run


def test_the_report_goes_from_probe_files_to_the_effect_by_member(
    family: RunDir, main: Main
) -> None:
    code, out, err = main("report", family.root)
    assert code == 0, err
    assert "Effect by member" in out
    report = json.loads(family.report_json.read_text(encoding="utf-8"))
    assert [one["name"] for one in report["run"]["members"]] == ["small", "medium"]
    (entry,) = report["answers"]["experiments"]
    assert entry["member"] is None
    effects = {other["member"]: other["primary"]["effect"] for other in entry["members"]}
    assert effects["small"] == entry["primary"]["effect"]
    assert effects["medium"] > entry["primary"]["effect"] + 0.5
    page = family.report_html.read_text(encoding="utf-8")
    assert 'id="q0-members-' in page
    assert "This answer is for the whole model" in page
    slope = entry["size_slope"]
    sizes = {one["member"]: one["parameters"] for one in slope["sizes"]}
    assert sizes == {None: report["run"]["parameters"], "small": 4_000, "medium": 9_000}
    assert slope["verdict"]["kind"] == "exploratory", "nobody declared it"
    assert "It was not declared before training." in page
    assert "slope (exploratory)" in out
    rows = report["answers"]["controls"]["placebo"]["by_member"]
    assert {row["member"] for row in rows} == {None, "small", "medium"}
    assert "A/A placebo at every member" in page


def test_what_was_said_of_the_whole_model_stays(family: RunDir, main: Main) -> None:
    main("report", family.root)
    now = json.loads(family.report_json.read_text(encoding="utf-8"))["answers"]
    then = json.loads((family.root.parents[1] / "report.json").read_text())["answers"]
    for a, b in zip(now["experiments"], then["experiments"], strict=True):
        for name in ("effect", "low", "high", "p", "p_corrected"):
            assert a["primary"][name] == pytest.approx(b["primary"][name]), name


def test_frames_hold_every_member(family: RunDir) -> None:
    run = motet.load(family.root)
    assert run.scores.groupby("member").size().to_dict() == {
        "medium": 420, "small": 420, "whole": 420,
    }  # fmt: skip
    primary = run.answers[run.answers.primary]
    assert set(primary.member) == {"whole"}
    assert set(run.answers.member) == {"whole", "small", "medium", "all"}


def test_the_mirror_gets_the_effect_of_every_experiment_at_every_member(
    family: RunDir, main: Main, monkeypatch: pytest.MonkeyPatch
) -> None:
    from motet.launcher.rank import trackers

    code, _, err = main("report", family.root, "--wandb")
    assert code == 2
    assert "metrics.wandb is off in this run" in err
    sent: dict[str, Any] = {}

    class Mirror:
        def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
            sent[name] = [dict(zip(columns, row, strict=True)) for row in rows]

        def summary(self, values: dict[str, Any]) -> None:
            sent.setdefault("summary", {}).update(values)

        def close(self, wait_s: float | None = None) -> None:
            sent["closed"] = True

    monkeypatch.setattr(trackers, "open_mirror", lambda *_: Mirror())
    assert main("report", family.root, "--wandb")[0] == 0
    report = json.loads(family.report_json.read_text(encoding="utf-8"))
    (entry,) = report["answers"]["experiments"]
    mine = [row for row in sent["effects_by_member"] if row["experiment"] == entry["name"]]
    assert [row["member"] for row in mine] == ["small", "medium", "whole model", "all"]
    assert mine[2]["effect"] == entry["primary"]["effect"]
    assert mine[3]["effect"] == entry["size_slope"]["effect"]
    assert {row["experiment"] for row in sent["effects_by_member"]} > {entry["name"]}
    answers = {row["experiment"]: row for row in sent["answers"]}
    primary = entry["primary"]
    told = [answers[entry["name"]][name] for name in ("effect", "low", "high", "p_corrected")]
    assert told == [primary[name] for name in ("effect", "low", "high", "p_corrected")]
    assert answers[entry["name"]]["verdict"] == entry["verdict"]["kind"]
    roles = {row["role"] for row in sent["answers"]}
    assert roles == {"question", "placebo", "positive_control"}
    assert sent["summary"][f"answers/{entry['name']}/effect"] == primary["effect"]
    assert sent["summary"][f"answers/{entry['name']}/verdict"] == entry["verdict"]["kind"]
    assert sent["closed"]
