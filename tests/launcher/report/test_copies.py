"""Answers as text to copy, and a report that tells nothing of the machine it was made on."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.experiments.types import OutcomeSpec
from motet.launcher.commands import report as report_command
from motet.launcher.report.collect import in_order_of_the_file
from motet.launcher.report.copies import copies
from motet.launcher.report.page import render
from motet.launcher.report.places import short, without_places
from tests.launcher import sample_report
from tests.system.runs import motet_here

ROOT = Path("/home/somebody/work/runs/quiz")


def test_the_answers_can_be_copied_in_three_forms_with_equal_numbers() -> None:
    found = dict(copies(sample_report.sample()))
    assert list(found) == ["Markdown", "CSV", "LaTeX"]
    rows = list(csv.DictReader(io.StringIO(found["CSV"])))
    canaries = rows[0]
    assert (canaries["experiment"], canaries["effect"], canaries["units"]) == (
        "canaries",
        "4.31",
        "64",
    )
    line = next(line for line in found["Markdown"].splitlines() if line.startswith("| canaries"))
    assert "+4.31 bits" in line
    assert "Effect found" in line
    assert len(found["Markdown"].splitlines()) == len(rows) + 2
    assert r"\begin{tabular}" in found["LaTeX"]
    assert copies(sample_report.bare()) == []


def test_the_page_holds_the_copies_as_text() -> None:
    page = render(sample_report.sample())
    assert "The same as text to copy: Markdown, CSV, LaTeX" in page
    assert r"\begin{tabular}" in page


def test_what_is_closed_on_a_screen_is_open_on_paper() -> None:
    paper = render(sample_report.sample()).split("@media print {")[1]
    assert "details::details-content { display: block; content-visibility: visible" in paper
    assert "color-scheme: light" in paper
    narrow = render(sample_report.sample()).split("@media screen and (max-width")
    assert len(narrow) == 2, "a sheet of paper is narrow, and shows tables as a wide screen does"


def test_no_path_of_the_machine_is_left_in_a_report() -> None:
    report = {
        "run": {
            "data": [{"path": "/home/somebody/work/corpora/mine"}, {"path": "/big/shared/c4"}],
            "config_yaml": "runs: /home/somebody/work/runs\nfrom_hf: /models/llama/8b\nsteps: 3\n",
        },
        "first_line": f"{ROOT}/ledger is damaged; /big/shared/c4 and /big/shared/c4/x too",
        "answers": {"experiments": [{"name": "a/b", "n": 3}]},
    }
    found = without_places(report, ROOT)
    assert [one["path"] for one in found["run"]["data"]] == ["corpora/mine", "…/shared/c4"]
    assert found["run"]["config_yaml"] == "runs: runs\nfrom_hf: …/llama/8b\nsteps: 3\n"
    assert found["first_line"] == "runs/quiz/ledger is damaged; …/shared/c4 and …/shared/c4/x too"
    assert found["answers"] == report["answers"]


@given(st.lists(st.text("abc.", min_size=1, max_size=4).filter(lambda s: s.strip(".")), min_size=1))
def test_a_short_path_never_begins_at_the_root(parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    assert not short(path, Path("/home/somebody")).startswith("/")


def test_answers_stand_in_the_order_of_the_file() -> None:
    answers = {
        "alpha": 0.05,
        "experiments": [{"name": n} for n in ("tight", "b", "a", "other file")],
    }
    manifest = {"config": {"experiments": {"list": [{"name": n} for n in ("a", "b", "tight")]}}}
    found = in_order_of_the_file(answers, manifest)
    assert [e["name"] for e in found["experiments"]] == ["a", "b", "tight", "other file"]
    assert in_order_of_the_file(answers, {})["experiments"] == answers["experiments"]


def test_chance_is_a_guess_or_the_mean_without_any_effect() -> None:
    spec = OutcomeSpec("x", "x", "bits", "better")
    assert spec.guess is None
    assert OutcomeSpec("x", "x", "accuracy", "better", binary=True, chance=0.25).guess == 0.25
    assert OutcomeSpec("x", "x", "bits", "better", null_values=(0.0, 1.0, 5.0)).guess == 2.0


def test_a_table_is_asked_for_with_its_form_and_alone(tmp_path: Path) -> None:
    assert report_command.FORMATS == ("md", "csv", "latex")
    done = motet_here("report", "runs/x", "--format", "csv", cwd=tmp_path)
    assert done.returncode == 2
    assert "--format csv is of a table; give --table answers" in done.stderr


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    from tests.kept_runs import unpack

    return unpack(tmp_path) / "runs" / "finished"


def test_a_kept_run_prints_its_answers_and_its_page_names_no_folder(finished: Path) -> None:
    shown = motet_here("report", str(finished), "--table", "answers")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("| experiment | outcome |")
    both = motet_here("report", str(finished), "--table", "answers", "--json")
    assert "--table and --json are two things" in both.stderr
    assert motet_here("report", str(finished)).returncode == 0
    told = (finished / "report.html").read_text() + (finished / "report.json").read_text()
    assert str(finished.parents[1]) not in told
    curve = json.loads((finished / "report.json").read_text())["answers"]["experiments"][0][
        "curves"
    ]
    assert curve["dose_response"]["chance"] > 0
