"""Tables for others: complete where a program reads them, readable and escaped where people do."""

from __future__ import annotations

import csv
import importlib.util
import io
import re
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.errors import UserError
from motet.launcher.report import frames, tables, words
from tests.launcher import sample_report

NASTY = [
    "=1+1",
    "+2",
    "-3",
    "@x",
    "\t=1",
    "a|b",
    "50 % & _x_ #1 $y$ {z} ~^\\",
    "<b>[l](u)</b>",
    '"',
]


def answers(report: dict[str, Any] | None = None) -> pd.DataFrame:
    return frames.answers((report or sample_report.sample())["answers"])


def test_csv_gives_back_every_number() -> None:
    frame = answers()
    read = pd.read_csv(io.BytesIO(tables.csv(frame)))
    assert list(read.columns) == list(frame.columns)
    assert read.effect.tolist() == pytest.approx(frame.effect.astype(float).tolist(), nan_ok=True)
    assert (read.effect.dropna() < 0).any(), "a negative number stays a number"


def test_no_text_of_a_csv_is_a_formula_and_no_number_is_changed() -> None:
    frame = pd.DataFrame({"text": NASTY, "number": [-1.5] * len(NASTY)})
    rows = list(csv.reader(io.StringIO(tables.csv(frame).decode())))[1:]
    assert [row[0] for row in rows[:5]] == ["'=1+1", "'+2", "'-3", "'@x", "'\t=1"]
    assert [row[0] for row in rows[5:]] == NASTY[5:]
    assert {row[1] for row in rows} == {"-1.5"}


def cells(line: str) -> list[str]:
    """The cells of a Markdown row, split where a reader of Markdown splits."""
    found, cell, escaped = [], "", False
    for char in line:
        if char == "|" and not escaped:
            found.append(cell.strip())
            cell = ""
        elif char != "\\" or escaped:
            cell += char
        escaped = char == "\\" and not escaped
    return found[1:]


@given(st.lists(st.text(min_size=1, max_size=20), min_size=1, max_size=4))
def test_any_text_stays_one_cell_of_a_markdown_table(texts: list[str]) -> None:
    lines = tables.markdown(pd.DataFrame({"a": texts, "b": 1})).decode().split("\n")
    assert len(lines) == len(texts) + 3
    for text, line in zip(texts, lines[2:], strict=False):
        assert cells(line) == [words.printable(text).strip(), "1"]


def test_markup_in_a_markdown_cell_is_escaped() -> None:
    text = tables.markdown(pd.DataFrame({"a": NASTY})).decode()
    assert "\\<b\\>\\[l\\](u)\\</b\\>" in text
    assert "\\$y\\$" in text


def test_answers_for_reading_are_those_of_the_report() -> None:
    text = tables.markdown(answers()).decode()
    assert text.startswith("| experiment | outcome | contrast | effect | interval | p | units |")
    assert "| +4.31 bits | \\[+3.39, +5.23\\] | 0.0005 | 64 | Effect found |" in text
    family = tables.markdown(answers(sample_report.family())).decode()
    assert "| experiment | member | outcome |" in family
    assert "| canaries | medium | exposure |" in family
    assert tables.markdown(answers(sample_report.bare())).decode().count("\n") == 2


def test_a_program_reads_the_note_on_coverage_and_every_kind_of_verdict() -> None:
    report = sample_report.sample()
    kinds = list(words.VERDICT_LABELS)
    entries = report["answers"]["experiments"] = [sample_report.questions()[0] for _ in kinds]
    for entry, kind in zip(entries, kinds, strict=True):
        entry["verdict"] = {"kind": kind, "sentence": f"{kind}."}
    entries[0]["primary"]["coverage_note"] = "85 % of such intervals hold the true effect"
    other = {"step": 900, "why": "later", "primary": entries[1]["primary"], "sentence": "Later."}
    entries[1]["exploratory"] = [other]
    read = pd.read_csv(io.BytesIO(tables.csv(answers(report))))
    main = read[read.primary & (read.role == "question")]
    assert main.verdict.tolist() == kinds
    assert main.coverage_note.dropna().tolist() == ["85 % of such intervals hold the true effect"]
    assert read[~read.primary].verdict.dropna().tolist() == ["exploratory"]
    shown = tables.markdown(answers(report)).decode()
    assert all(f"| {label} |" in shown for label in words.VERDICT_LABELS.values())


def test_special_characters_of_latex_are_escaped() -> None:
    text = tables.latex(pd.DataFrame({"a": NASTY, "b": 1.0})).decode()
    assert r"50 \% \& \_x\_ \#1 \$y\$ \{z\} \textasciitilde{}\textasciicircum{}" in text
    assert r"\textless{}b\textgreater{}[l](u)" in text
    assert text.count(r"\\" + "\n") == len(NASTY) + 1
    assert r"{}[$-$" in tables.latex(answers()).decode()
    power = pd.DataFrame({"a": ["1.2 × 10⁻⁷"]})
    assert r"1.2 $\times$ 10$^{-7}$" in tables.latex(power).decode()


def test_latex_needs_no_package_but_booktabs() -> None:
    """pdflatex read these tables; it does not know, for one, the quote of T1-encoded fonts."""
    nasty = pd.DataFrame({"a": NASTY})
    text = "".join(tables.latex(frame).decode() for frame in (nasty, answers()))
    plain = {
        "usepackage",
        "begin",
        "end",
        "toprule",
        "midrule",
        "bottomrule",
        "times",
        "ldots",
        "char",
    }
    plain |= {f"text{name}" for name in ("backslash", "asciitilde", "asciicircum")}
    plain |= {f"text{name}" for name in ("less", "greater", "bar")}
    assert set(re.findall(r"\\([a-zA-Z]+)", text)) <= plain


def test_parquet_gives_back_types_and_columns_of_several_types_become_text() -> None:
    frame = answers().assign(mixed=[1, "a", None] + [2] * (len(answers()) - 3))
    read = pd.read_parquet(io.BytesIO(tables.parquet(frame)))
    assert read.effect.tolist() == pytest.approx(frame.effect.astype(float).tolist(), nan_ok=True)
    assert read.mixed.tolist()[:2] == ["1", "a"]
    assert pd.isna(read.mixed[2])
    assert read.primary.dtype == bool


def test_without_pyarrow_parquet_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "pyarrow" else real(name)
    )
    with pytest.raises(UserError, match=r"pip install 'motet\[data\]'"):
        tables.parquet(answers())
