"""`motet experiments new`: a class of one's own that passes its own test, and overwrites nothing."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from motet.core.errors import UserError
from motet.experiments.library import kinds
from motet.experiments.library.kinds import GROUP, Library
from motet.experiments.library.tried import try_experiment
from tests.launcher.conftest import Main

OWN = Path(__file__).parents[3] / "examples" / "slogans.py"


def test_what_is_written_passes_its_own_test_and_is_never_overwritten(
    main: Main, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = main("experiments", "new", "two_words", "--dry-run")
    assert code == 0
    assert "class TwoWords(Experiment)" in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = main("experiments", "new", "two_words")
    assert code == 0
    assert 'use: "two_words.py:TwoWords"' in out
    lines = (tmp_path / "two_words.py").read_text().splitlines()
    assert 25 <= len(lines) <= 45
    assert max(map(len, lines)) <= 100
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_two_words.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    (tmp_path / "two_words.py").write_text("mine")
    code, _, err = main("experiments", "new", "two_words")
    assert code == 2
    assert "two_words.py and test_two_words.py already there" in err
    assert (tmp_path / "two_words.py").read_text() == "mine"


@pytest.mark.parametrize("name", ["Two", "test_x", "a b", "../x", ""])
def test_a_name_that_is_no_file_of_its_own_is_refused(main: Main, name: str) -> None:
    code, _, err = main("experiments", "new", name)
    assert code == 2
    assert "must begin with a small letter" in err


def test_a_mistake_in_what_reads_the_written_text_is_found_before_training(
    tmp_path: Path,
) -> None:
    text = OWN.read_text().replace('" " + row["end"])', '" " + row["end"], 4)')
    text = text.replace("import Experiment", "import generated_texts, Experiment")
    bad = "[int(t) for t in generated_texts(scores)]; x = "
    text = text.replace(
        '        return {"logprob": ', "        x = " + bad + '1\n        return {"logprob": '
    )
    (tmp_path / "slogans.py").write_text(text)
    with pytest.raises(UserError, match=r"slogans\.py:\d+: ValueError: invalid literal for int"):
        try_experiment("slogans.py:Slogans", tmp_path)
    (tmp_path / "slogans.py").write_text(OWN.read_text())
    assert len(try_experiment("slogans.py:Slogans", tmp_path).units) == 12


def test_two_packages_that_offer_one_name_are_told_apart_by_whoever_writes_run_yaml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    offered = [("psalms", "a.b:C"), ("psalms", "d.e:F"), ("memorization", "a.b:C"), ("one", "x:Y")]
    points = [EntryPoint(name, value, GROUP) for name, value in offered]
    monkeypatch.setattr(kinds, "entry_points", lambda group: points)
    assert kinds.installed() == {"one": "x:Y", "psalms": "a.b:C, d.e:F"}
    library = Library(tmp_path)
    with pytest.raises(
        UserError, match=r"two installed packages offer; write one of a\.b:C, d\.e:F"
    ):
        library.kind("psalms", "experiments.x.use")
    with pytest.raises(UserError, match="module 'x' is not installed"):
        library.kind("one", "experiments.x.use")
    with pytest.raises(
        UserError, match=r"must be one of .*memorization.*one, .*did you mean 'one'"
    ):
        library.kind("oen", "experiments.x.use")
    assert library.kind("memorization", "x").__module__.startswith("motet.")
