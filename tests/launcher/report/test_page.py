"""report.json, the page made of it, and the summary for a terminal."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from motet.launcher import report as report_package
from motet.launcher.report import words
from motet.launcher.report.page import render
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
    attacked = every_text_hostile(sample_report.small(), frozenset({"role"}))
    clean = Page(render(sample_report.small()))
    page = Page(render(attacked))
    assert "script" not in page.tags
    assert set(page.tags) <= set(clean.tags) | {"p"}
    assert {(t, n) for t, n, _ in page.attributes} <= {(t, n) for t, n, _ in clean.attributes} | {
        ("p", "role")
    }


def test_no_name_of_a_member_can_bring_in_a_tag() -> None:
    attacked = render(every_text_hostile(sample_report.family(), frozenset({"role"})))
    assert "script" not in Page(attacked).tags


def test_a_run_of_several_members_shows_the_effect_by_member(html: str) -> None:
    whole = render(sample_report.family())
    page = Page(whole)
    assert page.open == []
    ids = [value for _, name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "exposure, any dose vs dose 0, small" in page.text
    assert "This answer is for member small, as declared before training." in page.text
    assert "This answer is for the whole model, as declared" in page.text
    table = page.text[page.text.index("Effect by member: exposure Member Parameters") :]
    places = [
        table.index(name)
        for name in ("small", "medium exploratory 520,000", "whole model exploratory 1,212,416")
    ]
    assert places == sorted(places), "in the order of parameters"
    assert "small the answer is for this one 210,000 +4.31 bits" in table
    assert "Effect on exposure by parameters, in bits. small: 4.31; medium: 4.8" in whole
    assert 'id="q0-members-' in whole
    assert 'id="q1-members-' not in whole, "one member of two has no estimate: no picture"
    assert "Effect by member" not in html


def test_the_terminal_shows_the_effect_by_member_and_which_one_is_answered() -> None:
    def shown(report: dict[str, Any]) -> str:
        out = io.StringIO()
        Console(file=out, width=100).print(report_package.terminal_summary(report))
        return out.getvalue()

    text = shown(sample_report.family())
    (row,) = re.findall(r"canaries +small \*.*", text)
    assert "210,000" in row
    assert "+4.31 bits [+3.39, +5.23]" in row
    assert re.search(r"canaries +whole model +1.21 million +\+5\.20 bits", text)
    assert "Effect by member" not in shown(sample_report.sample())


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
    page = Page(render(sample_report.small() | {"first_line": notice}))
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
    report = sample_report.small()
    answers, controls = report["answers"], sample_report.controls()
    answers["experiments"] += [controls["placebo"], controls["positive"]]
    answers["controls"] = {
        "placebo": {"name": "placebo", "ok": True, "sentence": "A/A is quiet."},
        "positive": None,
    }
    page = Page(render(report))
    assert "1 question asked" in page.text
    assert "A/A is quiet." in page.text
    assert "no positive control" in page.text
    assert [v for t, n, v in page.attributes if n == "id" and re.fullmatch(r"c\d", v)] == [
        "c0",
        "c1",
    ]


def test_a_failed_control_and_lost_exposures_are_told_before_the_answers() -> None:
    report = sample_report.small()
    report["answers"]["controls"] = sample_report.controls()
    report["answers"]["controls"]["placebo"] |= {"ok": False, "sentence": "It found an effect."}
    text = Page(render(report)).text
    assert text.index("A/A placebo failed: It found an effect.") < text.index("question asked")
    assert text.index("7 missing of 5,933") < text.index("question asked")


def test_the_page_shows_cost_compliance_hashes_and_how_to_audit(page: Page) -> None:
    for told in (
        "4 min 11 s", "9.83 million", "8.9 × 10¹³", "2.2 %", "9 %", "0f" * 32, "1e" * 32,
        "motet experiments audit runs/stdlib-demo", "5,926 were consumed exactly once",
        "broken-items: 7 exposures fell on the skipped step 233", "SIGTERM", "1 skipped update",
        "step 0.5 s measured, 0.48 s predicted",
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
    report = sample_report.small()
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
    report = sample_report.small()
    del report["answers"]["experiments"][0][part]
    assert "invented-mcq" in Page(render(report)).text


def test_equal_reports_give_equal_bytes() -> None:
    first = render(sample_report.small())
    assert render(json.loads(json.dumps(sample_report.small()))) == first


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


def test_a_test_of_all_arms_shows_the_one_that_differs_most() -> None:
    rows = [
        {"arm": "none", "effect": None, "low": None, "high": None, "p": None},
        {"arm": "once", "effect": 0.5, "low": -0.5, "high": 1.5, "p": 0.4},
        {"arm": "often", "effect": -2.0, "low": -3.0, "high": -1.0, "p": 0.001},
    ]
    outcome = {"test": "omnibus", "unit": "bits", "effect": None, "low": None, "high": None}
    assert words.estimate({**outcome, "per_arm": rows}) == ("−2.0 bits in often", "[−3.0, −1.0]")
    assert words.estimate(outcome) == (words.MISSING, "")


def test_the_interval_graphic_of_a_test_of_all_arms_is_that_of_the_same_arm() -> None:
    report = sample_report.small()
    primary = report["answers"]["experiments"][0]["primary"]
    primary |= {"test": "omnibus", "effect": None, "low": None, "high": None}
    assert '<svg class="forest found"' in render(report)
    primary["per_arm"] = []
    assert '<svg class="forest' not in render(report)


def test_a_declared_trend_is_told_once_and_another_test_s_trend_beside_it() -> None:
    report = sample_report.small()
    assert "Per doubling of the dose" in render(report)
    report["answers"]["experiments"][0]["primary"]["test"] = "trend"
    assert "Per doubling of the dose" not in render(report)
    assert "pp per doubling" in render(report)


@pytest.mark.parametrize("kind", ["saturated", "interim", "exploratory", "invalid", "not_found"])
def test_only_what_was_found_looks_found(kind: str) -> None:
    report = sample_report.small()
    entry = report["answers"]["experiments"][0]
    entry["verdict"] = {"kind": kind, "sentence": "A sentence."}
    html = render(report)
    assert f'class="verdict {kind}"' in html
    assert 'class="verdict found"' not in html
    assert "forest found" not in html


def test_a_trend_is_shown_per_doubling() -> None:
    outcome = {"test": "trend", "unit": "bits", "effect": 1.0, "low": 0.5, "high": 1.5}
    assert words.estimate(outcome) == ("+1.00 bits per doubling", "[+0.50, +1.50]")


def test_the_label_of_a_verdict_is_not_said_twice() -> None:
    assert words.sentence({"sentence": "Not found: it is 2 bits."}) == "It is 2 bits."
    assert words.sentence({"sentence": "A note: nothing."}) == "A note: nothing."
    assert words.sentence({}) == ""


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


def test_of_very_many_questions_those_with_the_smallest_p_are_drawn_and_all_are_told() -> None:
    report = sample_report.small()
    (first, *_) = report["answers"]["experiments"]
    count = 60
    report["answers"]["experiments"] = [
        {**first, "name": f"q-{n:02d}", "primary": {**first["primary"], "p": (count - n) / 100}}
        for n in range(count)
    ]
    html = render(report)
    assert len(html) / count < 40_000
    text = Page(html).text
    assert "Curves are drawn for the 24 questions with the smallest p-values" in text
    assert all(f"q-{n:02d}" in text for n in range(count))
    drawn = {n for n in range(count) if f'id="q{n}-dose' in html or f"#q{n}-dose" in html}
    assert drawn == set(range(count - 24, count))
