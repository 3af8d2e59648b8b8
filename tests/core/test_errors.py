from __future__ import annotations

import subprocess
import sys

import pytest

from motet.core.errors import Problem, UserError, raise_problems, suggest
from motet.launcher import cli
from motet.launcher.commands import listing
from motet.models.config import ModelError
from motet.parallel.cluster.description import ClusterError
from motet.parallel.layout.layout import LayoutError
from motet.slurm.errors import SlurmError, SlurmUnreachable

ERRORS = (UserError, ModelError, LayoutError, ClusterError, SlurmError, SlurmUnreachable)


@pytest.mark.parametrize("error", ERRORS)
def test_the_command_line_tells_every_room_s_error_without_a_traceback(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(arguments: object) -> int:
        raise error("layout.tp: 3 is too many; at most 2")

    monkeypatch.setattr(listing, "run", fail)
    assert cli.main(["ls"]) == cli.EXIT_USER_ERROR
    assert capsys.readouterr().err == "motet: layout.tp: 3 is too many; at most 2\n"


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(arguments: object) -> int:
        raise ValueError("not the user's")

    monkeypatch.setattr(listing, "run", fail)
    with pytest.raises(ValueError, match="not the user's"):
        cli.main(["ls"])


def test_all_problems_stand_in_one_error_and_none_raises_nothing() -> None:
    raise_problems([])
    with pytest.raises(UserError, match=r"^a: b$"):
        raise_problems([Problem("a", "b")])
    with pytest.raises(UserError, match=r"^2 problems:\n  - a: b\n  - c: d$"):
        raise_problems([Problem("a", "b"), Problem("c", "d")])


def test_only_a_near_word_is_suggested() -> None:
    assert suggest("stpes", ["tokens", "steps"]) == " (did you mean 'steps'?)"
    assert suggest("zzz", ["tokens", "steps"]) == ""


def test_the_words_of_errors_are_not_searched_before_there_is_one() -> None:
    code = "import sys, motet.core.errors; sys.exit('difflib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
