from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from motet.core.errors import Problem
from motet.core.schema import MappingReader, beyond, hint_of, not_one_of

KNOWN = ("count", "share", "kind", "words", "inner", "options")


def read(**values: Any) -> tuple[MappingReader, list[Problem]]:
    problems: list[Problem] = []
    return MappingReader(values, "here", problems, KNOWN), problems


def told(problems: list[Problem]) -> list[str]:
    return [str(problem) for problem in problems]


def test_every_problem_of_a_mapping_is_gathered_and_defaults_stand_in() -> None:
    reader, problems = read(count=0, share=float("nan"), kind="b", words="x", cout=3)
    assert reader.whole("count", 4, 1, 9) == 4
    assert reader.number("share", 0.5, 0, 1, "of the run") == 0.5
    assert reader.choice("kind", ("abc", "def"), "abc") == "abc"
    assert reader.sequence("words") == []
    assert told(problems) == [
        "here.cout: is no setting (did you mean 'count'?)",
        "here.count: 0 is not a whole number from 1 to 9",
        "here.share: nan is not a number from 0 to 1 (of the run)",
        "here.kind: 'b' is not one of abc, def",
        "here.words: 'x' is not a list",
    ]


def test_true_is_no_number_and_a_missing_key_is_its_default() -> None:
    reader, problems = read(count=True)
    assert reader.whole("count", 2, 1) == 2
    assert (reader.number("share", None, 0, 1), reader.text("kind", "a")) == (None, "a")
    assert reader.mapping("inner") == {}
    assert told(problems) == ["here.count: True is not a whole number >= 1"]


def test_a_room_says_mistakes_in_its_own_words() -> None:
    class Own(MappingReader):
        UNKNOWN = "is not known"
        WRONG = "is {value}; it must be {what}"

    problems: list[Problem] = []
    reader = Own({"zzz": 1, "inner": [1]}, "here", problems, KNOWN)
    assert type(reader.inner("inner", ("a", "b"))) is Own
    assert told(problems) == [
        f"here.zzz: is not known; known are {', '.join(KNOWN)}",
        "here.inner: is [1]; it must be a mapping with a, b",
    ]


@dataclass(frozen=True)
class Options:
    flag: bool = False
    count: int = 3
    share: float = 0.5
    word: str = "a"


def test_options_have_the_types_of_their_defaults() -> None:
    reader, problems = read(options={"share": 1, "count": 5})
    found = reader.options("options", Options)
    assert found == Options(count=5, share=1.0)
    assert isinstance(found.share, float)
    assert not problems


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("flag", 1, "bool, for example False"),
        ("count", 1.0, "int, for example 3"),
        ("count", True, "int, for example 3"),
        ("share", "x", "float, for example 0.5"),
        ("word", 3, "str, for example 'a'"),
    ],
)
def test_an_option_of_another_type_is_refused(name: str, value: Any, what: str) -> None:
    reader, problems = read(options={name: value})
    assert reader.options("options", Options) == Options()
    assert told(problems) == [f"here.options.{name}: {value!r} is not {what}"]


def test_limits_and_choices_are_told_with_what_would_work() -> None:
    limits = {"above": 0, "most": 1000}
    assert beyond(0, limits, "steps") == "must be more than 0 steps"
    assert beyond(1001, limits) == "must be at most 1,000"
    assert beyond(1000, limits) == ""
    assert not_one_of("cpuu", ("cpu", "cuda")) == "is not one of cpu, cuda (did you mean 'cpu'?)"
    assert hint_of("x", ("alpha", "beta")) == "; known are alpha, beta"
