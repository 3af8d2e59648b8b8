"""report.json, the page made of it, and the summary for a terminal."""

from __future__ import annotations

import copy
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from motet.experiments.errors import UserError
from motet.launcher import report as report_package
from motet.launcher.report import collect, words
from motet.launcher.report.collect import Sources, assemble
from motet.launcher.report.page import render
from motet.launcher.rundir import RunDir
from tests.launcher import sample_report

VOID = {"meta", "img", "br", "hr", "input", "link", "use", "path"}


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def html() -> str:
    return render(sample_report.sample())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_the_page_is_well_formed(page: Page) -> None:
    assert page.open == []


def test_hostile_texts_are_shown_as_text_everywhere(html: str, page: Page) -> None:
    assert not {"script", "img", "iframe", "object", "link"} & set(page.tags)
    assert page.text.count("<script>alert('x')</script>") >= 8
    assert not [a for a in page.attributes if a[1].startswith("on")]
    assert "<script" not in html


def every_text_hostile(value: Any, keep: frozenset[str]) -> Any:
    """The report with every free text replaced by an attack; the keys in `keep` stay."""
    if isinstance(value, dict):
        return {k: v if k in keep else every_text_hostile(v, keep) for k, v in value.items()}
    if isinstance(value, list):
        return [every_text_hostile(v, keep) for v in value]
    return "\"'><script>alert(1)</script>" if isinstance(value, str) else value


def test_no_field_of_the_report_can_bring_in_a_tag_or_an_attribute() -> None:
    attacked = every_text_hostile(sample_report.sample(), frozenset({"role"}))
    clean = Page(render(sample_report.sample()))
    page = Page(render(attacked))
    assert "script" not in page.tags
    assert set(page.tags) <= set(clean.tags) | {"p"}
    assert {(t, n) for t, n, _ in page.attributes} <= {(t, n) for t, n, _ in clean.attributes} | {
        ("p", "role")
    }


@settings(max_examples=15, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_any_unicode_text_is_shown(text: str) -> None:
    report = sample_report.bare()
    report["first_line"] = text
    shown = Page(render(report)).text
    assert " ".join(text.replace("\0", "\ufffd").split()) in shown or not text.isprintable()


def test_nothing_is_fetched_from_anywhere(html: str, page: Page) -> None:
    fetched = [a for a in page.attributes if a[1] in ("src", "href", "srcset", "data", "action")]
    assert all(value.startswith("#") for _, _, value in fetched)
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert "http://" not in html
    assert "https://" not in html
    policy = [v for t, n, v in page.attributes if t == "meta" and n == "content" and "default" in v]
    assert policy == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_every_link_of_the_page_has_its_target(page: Page) -> None:
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    links = {value[1:] for tag, name, value in page.attributes if tag == "a" and name == "href"}
    assert links <= set(ids)


def test_a_changed_definition_is_the_first_line() -> None:
    notice = "Deviation from the definition: margin was 0.02 <now> 0.05"
    page = Page(render(sample_report.sample(notice)))
    body = page.text[page.text.index("one run") + len("one run") :].strip()
    assert body.startswith(notice)
    out = io.StringIO()
    Console(file=out, width=100).print(
        report_package.terminal_summary(sample_report.sample(notice))
    )
    assert out.getvalue().startswith(notice)


def test_without_deviation_there_is_no_notice(page: Page) -> None:
    assert "deviation" not in [value for _, name, value in page.attributes if name == "class"]


def test_every_question_has_a_row_and_a_section_and_every_control_a_sentence(page: Page) -> None:
    report = sample_report.sample()
    for entry in report["answers"]["experiments"]:
        assert page.text.count(entry["name"]) >= 3, entry["name"]
        assert " ".join(entry["verdict"]["sentence"].split()) in page.text
        assert " ".join(entry["hypothesis"].split()) in page.text
    for control in report["answers"]["controls"].values():
        assert control["sentence"] in page.text
    assert page.text.count("How often the text of a unit was put") == 1


def test_controls_listed_among_the_experiments_are_shown_once_and_not_as_questions() -> None:
    report = sample_report.sample()
    answers = report["answers"]
    answers["experiments"] += [answers["controls"]["placebo"], answers["controls"]["positive"]]
    answers["controls"] = {
        "placebo": {"name": "placebo", "ok": True, "sentence": "A/A is quiet."},
        "positive": None,
    }
    page = Page(render(report))
    assert "6 questions asked" in page.text
    assert "A/A is quiet." in page.text
    assert "no positive control" in page.text
    assert [v for t, n, v in page.attributes if n == "id" and re.fullmatch(r"c\d", v)] == [
        "c0",
        "c1",
    ]


def test_a_failed_control_and_lost_exposures_are_told_before_the_answers() -> None:
    report = sample_report.sample()
    report["answers"]["controls"]["placebo"] |= {"ok": False, "sentence": "It found an effect."}
    text = Page(render(report)).text
    assert text.index("A/A placebo failed: It found an effect.") < text.index("questions asked")
    assert text.index("7 missing of 5,933") < text.index("questions asked")


def test_the_page_shows_cost_compliance_hashes_and_how_to_audit(page: Page) -> None:
    for told in (
        "4 min 11 s", "9.83 million", "8.9 × 10¹³", "2.2 %", "9 %", "0f" * 32, "1e" * 32,
        "motet experiments audit runs/stdlib-demo", "5,926 were consumed exactly once",
        "broken-items: 7 exposures fell on the skipped step 233", "SIGTERM", "1 skipped update",
    ):  # fmt: skip
        assert told in page.text, told


def test_a_run_without_experiments_ledger_or_steps_still_gives_a_page() -> None:
    text = Page(render(sample_report.bare())).text
    for told in (
        "no step has been recorded yet", "carries no experiments", "no A/A placebo",
        "There is no ledger yet", "No training step", "has not finished",
    ):  # fmt: skip
        assert told in text, told


@pytest.mark.parametrize(
    "part", ["answers", "compliance", "training", "cost", "definition", "hashes", "run"]
)
def test_a_report_that_lacks_a_part_still_gives_a_page(part: str) -> None:
    report = sample_report.sample()
    del report[part]
    assert "</html>" in render(report)
    Console(file=io.StringIO()).print(report_package.terminal_summary(report))


@pytest.mark.parametrize(
    "part",
    [
        "primary",
        "arms",
        "curves",
        "secondary",
        "power",
        "verdict",
        "notes",
        "examples",
        "hypothesis",
    ],
)
def test_an_entry_that_lacks_a_part_still_gives_a_page(part: str) -> None:
    report = sample_report.sample()
    entry = report["answers"]["experiments"][0]
    del entry[part]
    report["answers"]["experiments"] = [entry]
    assert "canaries" in Page(render(report)).text


def test_equal_reports_give_equal_bytes(html: str) -> None:
    assert render(sample_report.sample()) == html
    assert render(json.loads(json.dumps(sample_report.sample()))) == html


def test_numbers_are_shown_to_the_precision_that_they_have() -> None:
    bits = {"effect": 4.3123, "low": 3.39, "high": 5.234, "unit": "bits"}
    assert words.estimate(bits) == ("+4.31 bits", "[+3.39, +5.23]")
    share = {"effect": -0.0314, "low": -0.051, "high": -0.012, "unit": "accuracy"}
    assert words.estimate(share) == ("−3.1 pp", "[−5.1, −1.2]")
    assert words.estimate({"effect": None, "unit": "bits"}) == ("–", "")
    assert words.estimate({"effect": 2.0, "low": None, "high": None, "unit": "x"}) == ("+2 x", "")
    assert [words.p_value(p) for p in (1e-9, 0.0004, 0.012, 0.5, None, float("nan"))] == [
        "< 0.0001", "0.0004", "0.012", "0.50", "–", "–",
    ]  # fmt: skip
    assert [words.number(x) for x in (0, 1234567, 0.05, -2.5, 1e-7, 12345.6)] == [
        "0", "1.2 × 10⁶", "0.05", "−2.5", "1.0 × 10⁻⁷", "12,346",
    ]  # fmt: skip


@given(st.floats(-1e6, 1e6), st.floats(1e-9, 1e6), st.sampled_from(["bits", "accuracy"]))
def test_no_estimate_is_shown_with_digits_beyond_its_interval(
    effect: float, half: float, unit: str
) -> None:
    told, shown = words.estimate(
        {"effect": effect, "low": effect - half, "high": effect + half, "unit": unit}
    )
    assert "e" not in told.split()[0]
    places = [len(t.partition(".")[2]) for t in (told.split()[0], *shown.strip("[]").split(", "))]
    assert not shown or len(set(places)) == 1


def test_the_terminal_summary_holds_the_answers_as_plain_text() -> None:
    out = io.StringIO()
    Console(file=out, width=80).print(report_package.terminal_summary(sample_report.sample()))
    text = out.getvalue()
    for told in (
        "canaries",
        "+4.31 bits",
        "Effect found",
        "Negligible",
        "Not valid",
        "A/A placebo",
    ):
        assert told in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "<script>" in text


def test_no_text_can_command_the_terminal() -> None:
    report = every_text_hostile(sample_report.sample(), frozenset({"role", "kind"}))
    attacked = json.loads(json.dumps(report).replace("<script>", "\\u001b[2J\\r"))
    out = io.StringIO()
    Console(file=out, width=80, color_system=None).print(report_package.terminal_summary(attacked))
    assert "alert(1)" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert "\r" not in out.getvalue()


# ---- report.json from what a run leaves behind


def fake_measured(name: str = "canaries") -> SimpleNamespace:
    return SimpleNamespace(
        experiment=SimpleNamespace(spec=SimpleNamespace(name=name)),
        exposure_steps=[np.array([3, 9]), np.array([5]), np.array([], dtype=np.int64)],
        planned=np.array([2, 1, 0]),
        consumed=np.array([2, 0, 0]),
    )


def fake_study(**changes: Any) -> SimpleNamespace:
    definition = {
        "steps_total": 10, "experiments": [{"spec": {"name": "canaries"}, "tokens": 1000}],
    }  # fmt: skip
    base: dict[str, Any] = {
        "measured": [fake_measured()], "definition": definition, "deviations": [], "seed": 0, "draws": 99,
        "compliance": {"planned": 3, "consumed_once": 2, "missing": 1, "ledger_ok": False, "problems": ["gone"]},
    }  # fmt: skip
    return SimpleNamespace(**(base | changes))


MANIFEST: dict[str, Any] = {
    "name": "r", "created": "2026-01-01T00:00:00+00:00", "motet_version": "0.1.0", "parameters": 10,
    "definition_sha256": "d" * 64, "plan_sha256": "e" * 64, "lock_sha256": None, "flops_per_token": 60.0,
    "tokens_per_step": 100, "sequence_length": 10, "config": {"batch": {"sequences": 10}, "model": {"d_model": 8}},
    "corpora": [{"path": "c", "fingerprint": "f" * 64, "n_tokens": 5, "n_documents": 2, "weight": 1.0}],
}  # fmt: skip


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "kind": "step", "step": step, "time": 1000.0 + step, "loss": 3.0, "lr": 1e-3, "grad_norm": 1.0,
        "tokens": 100 * step, "tokens_per_s": 50.0, "seconds": {"data": 0.5, "train": 1.5}, "skipped": False,
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
        "manifest": MANIFEST, "rows": rows, "attempts": attempts, "finished": True, "study": fake_study(),
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


def test_costs_are_added_up_from_rows_and_attempts() -> None:
    report = assemble(sources())
    assert report["cost"] == {
        "wall_s": 10.0, "tokens": 1000, "tokens_per_s": 50.0, "flops": 60_000.0, "mfu": None,
        "experiment_tokens": 1000, "experiment_share": 1.0, "probe_share": pytest.approx(5 / 25),
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
    assert len(record["steps"]) <= collect.MOST_POINTS + 1
    assert record["steps"][-1] == 50_000


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


def test_build_writes_both_files_for_their_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = write_run(tmp_path / "r")
    rundir.plan.mkdir()
    (rundir.plan / "definition.json").write_text("{}")
    answers = copy.deepcopy(sample_report.sample()["answers"])
    monkeypatch.setattr(collect, "analysed", lambda root: (fake_study(), answers, []))
    path = report_package.build(rundir)
    assert path == rundir.report_html
    assert path.stat().st_mode & 0o077 == 0
    saved = json.loads(rundir.report_json.read_text())
    assert saved["answers"]["experiments"][0]["name"] == "canaries"
    assert render(saved) == path.read_text()


def test_a_run_without_experiments_is_reported(tmp_path: Path) -> None:
    text = Page(report_package.build(write_run(tmp_path / "r")).read_text()).text
    assert "It carries no randomized experiments." in text


def test_experiments_that_cannot_be_read_yet_are_told_in_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rundir = write_run(tmp_path / "r")
    rundir.plan.mkdir()
    (rundir.plan / "definition.json").write_text("{}")
    problem = ["the experiments cannot be read yet: no probe"]
    monkeypatch.setattr(collect, "analysed", lambda root: (None, None, problem))
    assert "no probe" in Page(report_package.build(rundir).read_text()).text


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="manifest"):
        report_package.build(RunDir(tmp_path))
