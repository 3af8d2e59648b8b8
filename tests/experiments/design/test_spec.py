"""Definitions: what is read, what is refused, what is frozen."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.design.parser import parse_experiments
from motet.experiments.design.spec import Schedule
from motet.experiments.library.kinds import LIBRARY, Library

INVENTING = sorted(use for use, kind in LIBRARY.items() if not kind.needs_items)


def messages(entry: dict[str, Any], base: Path = Path()) -> str:
    return "\n".join(str(p) for p in parse_experiments([entry], base, Library(base))[1])


def spec_of(entry: dict[str, Any], base: Path = Path()) -> Any:
    specs, problems = parse_experiments([entry], base, Library(base))
    assert not problems, problems
    return specs[0]


@pytest.mark.parametrize("use", INVENTING)
def test_a_name_and_a_class_are_a_whole_definition(use: str) -> None:
    spec = spec_of({"name": "x", "use": use})
    assert 0 in spec.doses
    assert max(spec.doses) > 0
    assert len(LIBRARY[use](spec).units()) == spec.generate["count"]


def test_every_problem_is_reported_at_once() -> None:
    entries = [
        {"name": "Bad Name", "use": "memorization"},
        {"name": "a", "use": "memorisation"},
        {"name": "b", "use": "memorization", "dose": [0, 1], "alpha": 2},
        {"name": "c", "use": "memorization", "schedule": {"kind": "unifrm", "windows": []}},
        {"name": "b", "use": "placebo"},
        "not a mapping",
    ]
    text = "\n".join(str(p) for p in parse_experiments(entries, Path(), Library(Path()))[1])  # type: ignore[arg-type]
    assert "experiments[0].name: is 'Bad Name'" in text
    assert "did you mean 'memorization'?" in text
    assert "experiments.b.dose: is not a setting (did you mean 'doses'?)" in text
    assert text.count("experiments.b.alpha: is 2; a run has one significance level") == 1
    assert "experiments.c.schedule.kind: is 'unifrm'" in text
    assert "did you mean 'uniform'?" in text
    assert "experiments.c.schedule.windows" in text
    assert "experiments.b.name: is the name of two experiments" in text
    assert "experiments[5]" in text


def test_an_alpha_that_is_the_runs_is_accepted_and_no_other() -> None:
    def problems(alpha: object) -> list[str]:
        entry = {"name": "x", "use": "memorization", "alpha": alpha}
        specs, found = parse_experiments([entry], Path(), Library(Path()), 0.01)
        assert specs[0].alpha == 0.01
        return [str(problem) for problem in found]

    assert problems(0.01) == problems(None) == []
    for wrong in (0.5, 0.05, 0, "0.01"):
        (said,) = problems(wrong)
        assert "set experiments.alpha before training" in said


@pytest.mark.parametrize(
    ("change", "needle"),
    [
        ({"doses": [1, 4]}, "no dose 0"),
        ({"doses": [0]}, "at least two"),
        ({"doses": [0, 0]}, "no dose above 0"),
        ({"doses": [0, 1, 1]}, "repeats"),
        ({"doses": [0, -1]}, "a number >= 0"),
        ({"doses": [0, 1.5]}, "whole"),
        ({"doses": [0, True]}, "a number >= 0"),
        ({"doses": [0, 2], "dose_in": "share"}, "a share"),
        ({"doses": [0, 1], "weights": [1]}, "weights"),
        ({"doses": [0, 1], "weights": [1, 0]}, ">= 1"),
        ({"doses": [0, 1], "arms": []}, "together with doses"),
        ({"arms": [{"name": "a"}, {"name": "b", "dose": 1}]}, "dose: is missing"),
        (
            {"arms": [{"name": "a", "dose": 0}, {"name": "b", "dose": 1, "variants": "some"}]},
            "same",
        ),
        ({"schedule": {"window": [0, 1]}}, "[0.0, 1.0]"),
        ({"schedule": {"window": [0.9, 0.1]}}, "end must come after"),
        ({"schedule": {"window": [0.5, 900]}}, "two fractions"),
        ({"schedule": {"kind": "steps"}}, "needs the steps"),
        ({"schedule": {"kind": "steps", "at": [-1]}}, "a time is a step"),
        ({"schedule": {"kind": "tokens"}}, "token_range"),
        ({"schedule": {"kind": "tokens", "token_range": [5, 5]}}, "first < end"),
        ({"schedule": {"kind": "every", "every": 0}}, "steps >= 1"),
        ({"placement": "begin"}, "one of anywhere"),
        ({"probe_at": {"evry": 0.1}}, "did you mean 'every'?"),
        ({"probe_at": {"fractions": [0.1, 2]}}, "between 0 and 1"),
        ({"margin": -1}, "above 0"),
        ({"margin": float("nan")}, "above 0"),
        ({"items": "no.jsonl"}, "there is no file"),
        ({"generate": {"count": 1}}, ">= 2"),
        ({"options": {"n_references": "many"}}, "must be int"),
        ({"options": {"n_reference": 3}}, "did you mean 'n_references'?"),
        ({"options": {"n_references": 0}}, "at least 1"),
    ],
)
def test_a_wrong_setting_is_named_with_what_would_work(change: dict[str, Any], needle: str) -> None:
    assert needle in messages({"name": "x", "use": "memorization", **change})


def test_forgetting_needs_one_step_and_one_exposure() -> None:
    entry = {"name": "x", "use": "forgetting", "doses": [0, 2]}
    assert "compares 0 with 1" in messages(entry)
    other = {"name": "x", "use": "forgetting", "schedule": {"kind": "uniform"}}
    assert "one step" in messages(other)


def test_the_definition_names_items_by_content_and_not_by_path(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text(
            '{"id": "u1", "prefix": "x is"}\n{"id": "u2", "prefix": "y is"}\n'
        )
    entry = {"name": "x", "use": "memorization"}
    one = canonical_json(spec_of({**entry, "items": "a.jsonl"}, tmp_path).to_json())
    other = canonical_json(spec_of({**entry, "items": "b.jsonl"}, tmp_path).to_json())
    assert one == other
    assert "jsonl" not in one
    (tmp_path / "b.jsonl").write_text('{"id": "u1", "prefix": "x is"}\n')
    changed = spec_of({**entry, "items": "b.jsonl"}, tmp_path).to_json()
    assert canonical_json(changed) != one


def test_the_definition_spells_out_every_default() -> None:
    definition = spec_of({"name": "x", "use": "memorization"}).to_json()
    assert definition["options"]["n_references"] == 63
    assert definition["schedule"]["window"] == [0.0, 0.9]
    assert sha256_hex(canonical_json(definition)) == sha256_hex(
        canonical_json(json.loads(canonical_json(definition)))
    )


@given(
    st.recursive(
        st.one_of(st.integers(), st.text(), st.booleans(), st.none()),
        lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner),
        max_leaves=8,
    )
)
def test_canonical_json_is_one_text_per_value(value: Any) -> None:
    text = canonical_json(value)
    assert json.loads(text) == value
    assert canonical_json(json.loads(text)) == text


def test_canonical_json_refuses_nan() -> None:
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})


@given(st.integers(1, 10**6), st.floats(0, 0.5), st.floats(0.5, 1.0))
def test_fractions_become_steps_and_steps_stay(total: int, low: float, high: float) -> None:
    resolved = Schedule(window=(low, high), at=(0.5, 7)).resolve(total)
    assert 0 <= resolved.window[0] <= resolved.window[1] <= total
    assert resolved.at == (round(0.5 * total), 7)
    assert resolved.resolve(total * 2) == resolved


def test_the_first_step_is_no_later_than_the_schedule_allows() -> None:
    assert Schedule(kind="late", window=(0.0, 1.0)).first_step(1000) == 750
    assert Schedule(kind="every", start=0.1).first_step(1000) == 100
    assert Schedule(kind="steps", at=(600, 500)).first_step(1000) == 500
    assert Schedule(kind="tokens", token_range=(10, 20)).first_step(1000) == 0


def test_reading_definitions_imports_nothing_heavy() -> None:
    code = (
        "import sys; from pathlib import Path; "
        "from motet.experiments.design.parser import parse_experiments; "
        "from motet.experiments.library.kinds import Library; "
        "entries = [{'name': 'x', 'use': 'knowledge'}]; "
        "parse_experiments(entries, Path('.'), Library(Path('.'))); "
        "print([m for m in ('torch', 'scipy', 'statsmodels', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
