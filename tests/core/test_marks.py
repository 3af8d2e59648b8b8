"""What commands a terminal or turns the direction of writing leaves as marks, at every exit."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.marks import MarkedStream, marked, marked_json, marking, rich_console
from motet.launcher import cli
from motet.launcher.output.page import plain_page, table

ROOT = Path(__file__).parents[2]
HOSTILE = "a\x1b[2Jb\u202ec\x9bd\u2066\r\x07\u2028\ufeff\U000e0041"
SHOWN = r"a\x1b[2Jb\u202ec\x9bd\u2066\x0d\x07\u2028\ufeff\U000e0041"


def harmless(text: str) -> bool:
    return not any(
        unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp") and c not in "\t\n" for c in text
    )


def test_the_kinds_that_do_harm_are_marked_and_nothing_else() -> None:
    assert marked(HOSTILE) == SHOWN
    plain = "Ünïcødé 王\tx\u00a0y\nz \U0001f600"
    assert marked(plain) == plain
    assert marked("a\r\nb") == "a\nb"


@given(st.text())
def test_whatever_goes_in_comes_out_harmless_and_json_means_the_same(text: str) -> None:
    assert harmless(marked(text))
    written = marked_json(json.dumps([text], ensure_ascii=False))
    assert harmless(written)
    assert json.loads(written) == [text]


def test_streams_and_consoles_mark_what_they_are_given() -> None:
    raw = io.StringIO()
    print(HOSTILE, file=MarkedStream(raw))  # type: ignore[arg-type]
    assert raw.getvalue() == SHOWN + "\n"
    before = sys.stdout
    with marking():
        assert isinstance(sys.stdout, MarkedStream)
        assert rich_console().file is before, "a console's own codes must reach the terminal"
    assert sys.stdout is before


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_colours_but_is_not_commanded(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = io.StringIO()
    monkeypatch.setattr(sys, "stdout", raw)
    console = rich_console(
        force_terminal=terminal, width=200, color_system="standard" if terminal else None
    )
    console.print(f"[bold]{HOSTILE}[/bold]")
    assert "\x1b[2J" not in raw.getvalue()
    assert "\u202e" not in raw.getvalue()
    assert ("\x1b[1m" in raw.getvalue()) == terminal


def test_errors_of_commands_and_pages_are_marked(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["status", f"/no/{HOSTILE}"]) == 2
    assert cli.main(["report", f"/no/{HOSTILE}"]) == 2
    with pytest.raises(SystemExit):
        cli.main(["train", f"--{HOSTILE}"])
    out, err = capsys.readouterr()
    assert harmless(out + err)
    assert r"\x1b[2J" in err
    page = plain_page("k", HOSTILE, [table([{"name": HOSTILE}], str)])
    assert harmless(page)


def test_no_other_console_is_made_and_every_program_marks_what_it_prints() -> None:
    """The exits are few: consoles come from one function, programs begin with `marking`."""
    files = subprocess.run(
        ["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    own = [
        f
        for f in files
        if f.split("/")[0] in ("core", "experiments", "models", "parallel", "launcher", "slurm")
    ]
    for name in own:
        text = (ROOT / name).read_text(encoding="utf-8")
        made = [line for line in text.splitlines() if "Console(" in line and "class " not in line]
        assert not made, f"{name}: {made}; use core.marks.rich_console"
        assert "sys.stdout.write" not in text, name
    for name in ("batch", "node", "worker", "jobs/job", "measure/cluster_worker"):
        assert "with marking():" in (ROOT / f"launcher/{name}.py").read_text(encoding="utf-8")
