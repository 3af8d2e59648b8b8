"""What operators say of themselves, and that the page says it too."""

from __future__ import annotations

import re
from dataclasses import fields

import pytest

from motet.models.growth.registry import OPERATORS, operator
from tests.imports import ROOT

PAGE = (ROOT / "docs" / "growth.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_states_its_facts_and_stands_on_the_page(name: str) -> None:
    facts = OPERATORS[name].facts
    assert facts.name == name
    for field in fields(facts):
        assert getattr(facts, field.name) is not None or field.name == "rewarm", field.name
    assert (facts.loss_jump_nats == 0) == facts.exact.startswith("always")
    assert facts.changes
    row = re.search(rf"^\| `{name}` .*$", PAGE, re.MULTILINE)
    assert row
    bound = row[0].split("|")[6].strip()
    assert float(bound) == facts.loss_jump_nats
    assert ("negative" in row[0]) == facts.negative
    assert operator(name).rule is facts.moments


def test_the_example_on_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["growth"].exact  # type: ignore[attr-defined]
