"""What probes cost, before any training: tokens counted and steps that answers need."""

from __future__ import annotations

from pathlib import Path

import pytest

from motet.core.format import percent
from motet.experiments.scoring.probes import encode_items
from motet.launcher.config import run_yaml
from motet.launcher.study import probe_price
from motet.launcher.study.before_training import build
from motet.launcher.study.probe_price import ProbePrice, ProbePrices, probe_prices, work_of
from tests.launcher.guests import make_corpus

RUN = """
name: priced
data: {{sequence_length: 512, corpora: [{{path: {corpus}}}]}}
batch: {{sequences: 8}}
training: {{steps: 200}}
layout: {{processes: 1, device: cpu, micro_sequences: 8}}
probes: {{every: 0.1{budget}}}
experiments:
  controls: false
  list:
  - {{name: secrets, use: memorization, generate: {{count: 40}}, doses: [0, 4], options: {{n_references: 15}}}}
  - name: sums
    use: reasoning
    generate: {{count: 8}}
    arms: [{{name: held-out, dose: 0}}, {{name: practised, dose: 2, variants: cycle}}]
    options: {{levels: [1], held_out_levels: [2], problems: 4, tests: 1, reworded_tests: 1, max_tokens: 8}}
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize("budget", ["", ", budget: 0.05"])
def test_tokens_are_those_that_the_probes_have(corpus: Path, tmp_path: Path, budget: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(RUN.format(corpus=corpus, budget=budget))
    settings = run_yaml.load(str(path))
    study = build(settings)
    found = probe_prices(study, settings)
    assert found is not None
    for price, question in zip(found.prices, study.questions, strict=True):
        items = [item for unit in question.units for item in unit.items]
        encoded = encode_items(items, study.setting.tokenizer, 512, "x")
        exact = work_of(encoded, settings.probes.batch_tokens)
        assert price.tokens == pytest.approx(exact, rel=0.02)
        assert price.name == question.name
        assert price.times > price.needed >= 2
    tokens = {one.name: one.tokens for one in found.prices}
    assert tokens["sums"] > 8 * 2 * 8 * 32, "a pass for every token that is written"
    assert found.trained == 200 * 8 * 512
    end = "; probes.budget bounds the rest"
    if budget:
        end = f"held to 5 % or what answers need ({percent(found.needed_share)})"
    assert str(found).endswith(end)


def test_a_token_forward_is_a_third_of_a_token_of_training() -> None:
    prices = (ProbePrice("a", 300, 10, 2), ProbePrice("b", 100, 5, 5))
    found = ProbePrices(prices, trained=10_000, budget=None)
    assert found.share == pytest.approx((300 * 10 + 100 * 5) / 3 / 10_000)
    assert found.needed_share == pytest.approx((300 * 2 + 100 * 5) / 3 / 10_000)
    assert "400 tokens a time, at most 10 times" in str(found)
    assert pytest.approx(1 / 3) == probe_price.FORWARD
