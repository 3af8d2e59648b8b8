"""What operators say of themselves, and that the page says it too."""

from __future__ import annotations

import re
from dataclasses import fields, replace

import pytest
import torch

from motet.models.decoder import Decoder
from motet.models.growth.registry import OPERATORS, operator
from motet.models.growth.upcycling import mixture_of
from tests.imports import ROOT
from tests.models.growth.growing import EXACT, apart, language, larger, source_of, train

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


def test_the_loss_of_a_trained_model_rises_by_no_more_than_is_stated() -> None:
    config, model = source_of("llama", vocabulary_size=32, d_ffn=64, init_std=0.1, n_layers=2)
    losses = train(model, torch.optim.Adam(model.parameters(), 0.01), 60)
    assert losses[-1] < losses[0] - 1
    deep = replace(config, n_layers=4)
    wide = replace(config, d_model=48, head_dim=8, n_heads=6, n_kv_heads=3, d_ffn=96)
    twice = replace(config, d_model=64, head_dim=8, n_heads=8, n_kv_heads=4, d_ffn=128)
    half = replace(config, d_model=16, head_dim=8, n_heads=2, n_kv_heads=1, d_ffn=32, n_layers=1)
    targets = dict.fromkeys(OPERATORS, deep)
    targets |= dict.fromkeys(("bert2bert-fpi", "bert2bert-aki", "sparkling", "prefix"), wide)
    targets |= {"hypercloning": twice, "mango": replace(twice, n_layers=4), "coalesce": half}
    targets |= {"decoalesce": replace(twice, n_layers=4), "ligo": replace(wide, n_layers=4)}
    targets |= {"upcycling": mixture_of(config, 4, 2), "prune": replace(config, n_layers=1)}
    tokens = language(32, 32, 17, seed=999)

    def loss_of(of: Decoder) -> float:
        with torch.no_grad():
            sums = of(tokens[:, :-1], tokens[:, 1:], mode="loss")
        return float(sums.cross_entropy / sums.n_labels)

    before = loss_of(model)
    for name, target in targets.items():
        options = {"scores": {"layers": [1.0, 0.5]}} if name == "prune" else {}
        growth = operator(name, **options).growth(config, target)
        rise = loss_of(larger(growth, model)) - before
        assert rise <= max(OPERATORS[name].facts.loss_jump_nats, 1e-4), name
        assert not growth.exact or apart(growth, model) <= EXACT, name


def test_the_example_on_the_page_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["growth"].exact  # type: ignore[attr-defined]
