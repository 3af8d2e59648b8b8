"""What a user's own class may give: every kind of mistake is one error with file and line, before
training where it shows there, and when it is asked again where it does not.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from motet.core.errors import UserError
from motet.experiments.design.assignment import Question, ask
from motet.experiments.design.experiment import item_problems
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.trial import final_of, series_of, trial_problems
from motet.experiments.library.kinds import Library
from motet.experiments.types import ItemScores

SOURCE = (Path(__file__).parents[3] / "examples" / "slogans.py").read_text()
STEPS = 8
MEASURED = 'ItemTable(units).mean(per_token(scores), "end")'
LINE = 1 + SOURCE[: SOURCE.index(MEASURED)].count("\n")
OPTIONS = """
from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    share: float = 0.5

    def __post_init__(self):
        if self.share > 1:
            raise ValueError("share is more than 1")


"""


def problems(folder: Path, source: str, **settings: object) -> list[str]:
    """Everything that is said of a class, from its definition to its trial."""
    (folder / "slogans.py").write_text(source)
    library = Library(folder)
    entry = {"name": "slogans", "use": "slogans.py:Slogans", **settings}
    specs, found = parse_experiments([entry], folder, library)
    found = found or item_problems(specs[0], library)
    return [str(p) for p in found or trial_problems(ask(specs[0], 0, library), STEPS)]


def changed(old: str, new: str) -> str:
    assert SOURCE.count(old) == 1
    return SOURCE.replace(old, new)


def method(name: str, body: str) -> str:
    return f"{SOURCE}\n    def {name}(self, *arguments):\n        {body}\n"


def outcome(text: str) -> str:
    return changed("primary=True,", f"primary=True, {text},")


def unit(old: str, new: str) -> str:
    return changed(old, new)


def test_a_class_without_a_mistake_has_no_problem(tmp_path: Path) -> None:
    assert problems(tmp_path, SOURCE) == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (changed("primary=True", "primary=False"), "0 of them primary; one must be"),
        (outcome("contrast='ab'"), "contrast='ab'; it must be ((treated arms), (control arms))"),
        (outcome("contrast=(('no',), ('way',))"), "it must be ((treated arms), (control arms))"),
        (outcome("null_sd='wide'"), "null_sd='wide'; it must be None or a number above 0"),
        (outcome("chance=2"), "chance=2; it must be None or a share between 0 and 1"),
        (outcome("baseline='start'"), "with baseline='start'; measure gives logprob"),
        (changed('"logprob",\n', "3,\n"), "name=3; it must be text"),
        (changed(MEASURED, "[[1], [1, 2]] * 6"), "gives logprob of object [0] from measure"),
        (changed(MEASURED, "(1.0 for _ in units)"), "gives logprob of object [] from measure"),
        (changed(MEASURED, "[None] * len(units)"), "from measure; it must be 12 numbers"),
        (changed(MEASURED, "np.multiply(scores.logprob, 1, scores.logprob)"), "NameError"),
        (changed(MEASURED, "scores.logprob.sort()"), f"slogans.py:{LINE}: ValueError: "),
        (changed(MEASURED, "units.clear() or exit(0)"), f"slogans.py:{LINE}: SystemExit: 0"),
        (method("summarize", "return {}"), "gives no logprob from summarize"),
        (method("probe_steps", "return (i for i in (0, 8))"), "they must be a set"),
        (method("probe_steps", "return {0, 4}"), "without the last one, 8"),
        (method("probe_steps", "return {0, 'end'}"), "they must be a set"),
        (method("__init__", "exit(0)"), "SystemExit: 0"),
        (unit('" " + row["end"])\n', "7)\n"), "items: target=7; it must be text"),
        (unit('Unit(row["id"]', "Unit(7"), "id=7; it must be text"),
        (unit("(item,))", "(item,), {'a': float('nan')})"), "must be text or a finite number"),
        (unit("(item,))", "(item,), {'a': [1]})"), "must be text or a finite number"),
        (unit("(item,))", "(item,), {}, 3)"), "cluster=3; it must be text"),
        (unit('(row["start"] + " " + row["end"],)', "('\\ud800',)"), "half of a surrogate pair"),
        (changed('"doses": [0, 8]', '"probe_at": None'), ""),
    ],
)
def test_a_mistake_is_told_with_where_it_is(tmp_path: Path, source: str, said: str) -> None:
    found = problems(tmp_path, source)
    if said:
        assert len(found) in (1, 12)  # of the class, or of each of its units
        assert said in found[0]
        assert "experiments.slogans" in found[0]


def test_options_may_refuse_values_themselves(tmp_path: Path) -> None:
    source = OPTIONS + changed("    fields =", "    Options = Options\n    fields =")
    assert problems(tmp_path, source) == []
    (wrong,) = problems(tmp_path, source, options={"share": 2.0})
    assert wrong == "experiments.slogans.options: share is more than 1"


@pytest.fixture
def question(tmp_path: Path) -> Question:
    """A class whose mistakes show with true scores only."""
    fails = f"{MEASURED} if (scores.logprob == -1).all() else 1 / 0"
    late = "return {'logprob': arguments[3]['logprob'][0 if len(arguments[2]) == 2 else 5]}"
    text = changed(MEASURED, fails) + f"\n    def summarize(self, *arguments):\n        {late}\n"
    assert problems(tmp_path, text) == []
    library = Library(tmp_path)
    entry = {"name": "slogans", "use": "slogans.py:Slogans"}
    (spec,), _ = parse_experiments([entry], tmp_path, library)
    return ask(spec, 0, library)


def test_a_mistake_that_true_scores_bring_out_is_one_error_too(question: Question) -> None:
    units, ones = question.units, np.ones(len(question.units))
    counts = np.ones(len(units), dtype=np.int64)
    scores = ItemScores(-2.0 * ones, counts, counts, ones > 1)
    with pytest.raises(UserError, match=rf"slogans\.py:{LINE}: ZeroDivisionError"):
        series_of(question.experiment, units, scores)
    steps, none = np.arange(3), [np.empty(0, dtype=np.int64) for _ in units]
    series = {"logprob": np.stack([ones] * 3)}
    with pytest.raises(UserError, match=rf"slogans\.py:{LINE + 3}: IndexError"):
        final_of(question.experiment, units, question.arms, steps, series, none)


def test_a_class_may_import_whatever_reads_files_of_its_own(tmp_path: Path) -> None:
    """Only what the class itself opens would decide its answer unseen."""
    package = tmp_path / "site" / "dictionary"
    package.mkdir(parents=True)
    (package / "words.txt").write_text("a\n")
    reads = "from pathlib import Path\nWORDS = Path(__file__).with_name('words.txt').read_text()\n"
    (package / "__init__.py").write_text(reads)
    where = f"import sys\nsys.path.append({str(tmp_path / 'site')!r})\nimport dictionary\n"
    try:
        assert problems(tmp_path, f"{where}\n{SOURCE}") == []
    finally:
        sys.path.remove(str(tmp_path / "site"))
    opened = changed("return {", f"print(open({str(package / 'words.txt')!r}).read()); return {{")
    (said,) = problems(tmp_path, opened)
    assert "which is not frozen with the run" in said
