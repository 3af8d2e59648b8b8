"""Width multipliers of muP: numbers by hand, growth that keeps what is computed, and exports."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig
from motet.models.decoder import Decoder
from motet.models.growth.growth import grow
from motet.models.growth.multiplied import Multiplied
from motet.models.growth.registry import operator
from motet.models.growth.state import weights_of
from motet.models.hf import folded, from_hf, to_hf
from motet.models.width_multipliers import (
    fan_in_ratio,
    initial_scales,
    multiplied,
    multiplier_facts,
)
from tests.models.families import some_tokens, tiny
from tests.models.growth.growing import (
    EXACT,
    KINDS,
    all_grown,
    apart,
    larger,
    loaded,
    source_of,
    states,
)


def wider(config: ModelConfig, times: int = 2) -> ModelConfig:
    """A config of so many times the width of every block; heads keep their channels."""
    sizes: dict[str, Any] = {
        key: times * getattr(config, key) for key in ("d_model", "n_heads", "n_kv_heads", "d_ffn")
    }
    if config.n_experts:
        sizes |= {"d_expert": times * config.expert_width}
    if config.shared_width:
        sizes |= {"d_shared": times * config.shared_width}
    return replace(config, **sizes, head_dim=config.head_width)


def growth_of(
    name: str, config: ModelConfig, target: ModelConfig, **options: Any
) -> tuple[ModelConfig, Multiplied]:
    """The larger config with its multiplier, and how it is made; the old model is the base."""
    new = multiplied(config, target)
    made = operator(name, **options).growth(config, replace(new, output_multiplier=1.0))
    return new, Multiplied(made, new, initial_scales(config, new))


def test_matrices_know_how_many_times_more_they_read() -> None:
    config, _ = source_of("llama")
    target = replace(config, d_model=64, head_dim=8, d_ffn=144, n_layers=3)
    ratios = fan_in_ratio(config, target)
    assert ratios["blocks.2.attention.q_proj.weight"] == 2
    assert ratios["blocks.2.attention.o_proj.weight"] == 1
    assert ratios["blocks.0.feed_forward.down_proj.weight"] == 3
    assert not [name for name in ratios if "norm" in name or "embedding" in name]
    assert fan_in_ratio(None, target) == {}


def test_experts_are_compared_with_a_dense_base_by_what_they_read() -> None:
    base = tiny(d_ffn=48)
    mixture = replace(
        wider(base), n_experts=4, d_expert=24, n_shared_experts=1, d_shared=72, shared_gate=True
    )
    ratios = fan_in_ratio(base, mixture)
    part = "blocks.1.feed_forward"
    assert ratios[f"{part}.experts.up_proj"] == 2
    assert ratios[f"{part}.experts.down_proj"] == 0.5
    assert ratios[f"{part}.shared.down_proj.weight"] == 1.5
    assert ratios[f"{part}.router.weight"] == 2
    scales = initial_scales(base, mixture)
    assert scales[f"{part}.router.weight"] == scales[f"{part}.shared_gate.weight"] == 0.5
    assert scales[f"{part}.experts.up_proj"] == 2**-0.5


SIZES = (8, 16, 24, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_multipliers_depend_on_widths_alone_and_go_together(kind: str) -> None:
    """Over all pairs of widths: through a third width is the same, and of the base itself it is
    one; depth, vocabulary and seeds change nothing.
    """
    config, _ = source_of(kind)
    models = {d: replace(config, d_model=d, d_ffn=3 * d, n_heads=d // 4, n_kv_heads=d // 8)
              for d in SIZES}  # fmt: skip
    if kind == "olmo2":
        models = {d: replace(one, n_kv_heads=one.n_heads) for d, one in models.items()}
    models = {d: replace(one, head_dim=8) for d, one in models.items()}
    assert set(fan_in_ratio(models[8], models[8]).values()) == {1.0}
    for first, second, third in itertools.product(SIZES, repeat=3):
        one, two, three = models[first], models[second], models[third]
        whole, half = fan_in_ratio(one, three), fan_in_ratio(one, two)
        rest = fan_in_ratio(two, three)
        assert whole.keys() == {
            weight.name
            for weight in named_weights(three)
            if weight.name.startswith("blocks.") and len(weight.shape) > 1
        }
        for name, ratio in whole.items():
            assert ratio == pytest.approx(half[name] * rest[name])
        assert whole["blocks.0.attention.k_proj.weight"] == third / first
        assert multiplied(one, three).output_multiplier == first / third
        deep = replace(three, n_layers=4, vocabulary_size=50)
        for name, ratio in fan_in_ratio(one, deep).items():
            same = name.replace("blocks.2", "blocks.0").replace("blocks.3", "blocks.1")
            assert ratio == whole[same]


def test_the_facts_say_every_multiplier_that_is_not_one() -> None:
    base = tiny()
    assert multiplier_facts(base, multiplied(base, replace(base, n_layers=7))) == {
        "output": 1.0,
        "attention": 8**-0.5,
        "learning_rate": {},
    }
    found = multiplier_facts(base, multiplied(base, replace(wider(base), d_ffn=192)))
    assert found["output"] == 0.5
    assert found["attention"] == 8**-0.5  # heads have as many channels
    rates = {f"attention.{name}_proj.weight": [0.5] for name in "qkvo"}
    rates |= {f"feed_forward.{name}_proj.weight": [0.5] for name in ("gate", "up")}
    assert found["learning_rate"] == rates | {"feed_forward.down_proj.weight": [0.25]}


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_multiplied_in_every_mode(tied: bool) -> None:
    config, model = source_of("llama", tied_embeddings=tied)
    quarter = loaded(replace(config, output_multiplier=0.25), model.state_dict())
    tokens = some_tokens(config, 2, 9)
    with torch.no_grad():
        logits = model(tokens) / 4
        torch.testing.assert_close(quarter(tokens), logits)
        labels = tokens.roll(-1, 1)
        chosen = logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
        scores = quarter(tokens, labels, mode="score")
        torch.testing.assert_close(scores.logprob.float(), chosen, atol=1e-5, rtol=1e-5)
        sums = quarter(tokens, labels, mode="loss")
        torch.testing.assert_close(sums.cross_entropy.float(), -chosen.sum(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wider_model_computes_the_same_with_a_head_as_large_as_before(kind: str) -> None:
    """By hand: the head has tiles of the old one, undivided, and the multiplier is 1/2; where it
    is tied, the last norm has them.
    """
    config, model = source_of(kind)
    target, growth = growth_of("hypercloning", config, wider(config))
    assert growth.exact
    assert apart(growth, model) <= EXACT
    new, old = larger(growth, model).state_dict(), model.state_dict()
    if not config.tied_embeddings:
        torch.testing.assert_close(new["head.weight"], old["head.weight"].repeat(1, 2))
    torch.testing.assert_close(new["norm.weight"], old["norm.weight"].repeat(2))
    torch.testing.assert_close(new["embedding.weight"], old["embedding.weight"].repeat(1, 2))
    assert target.output_multiplier == 0.5


@pytest.mark.parametrize("kind", ["llama", "qwen3-tied"])
def test_moments_follow_the_gradient_of_the_multiplied_model(kind: str) -> None:
    """With gradients in place of moments, what `keep` gives is the gradient of the new model."""
    config, model = source_of(kind)
    tokens = some_tokens(config, 2, 12)
    _, growth = growth_of("hypercloning", config, wider(config))

    def gradients(of: Decoder) -> dict[str, Tensor]:
        of.zero_grad()
        of(tokens[:, :-1], tokens[:, 1:], mode="loss").cross_entropy.backward()
        return {name: parameter.grad for name, parameter in of.named_parameters()}  # type: ignore[misc]

    old = gradients(model)
    given = [
        (name, state | {"exp_avg": old[name], "exp_avg_sq": old[name].square()})
        for name, state in states(model)
    ]
    new = dict(grow(growth, given))
    found = gradients(loaded(growth.target, weights_of(new.items())))
    last = "norm.weight" if config.tied_embeddings else "head.weight"
    for name in (last, "blocks.0.attention.q_proj.weight"):
        torch.testing.assert_close(new[name]["exp_avg"], found[name], rtol=1e-3, atol=1e-5)
        squares = found[name].square()
        torch.testing.assert_close(new[name]["exp_avg_sq"], squares, rtol=1e-2, atol=1e-7)


def test_layers_that_begin_anew_have_values_of_their_width() -> None:
    """Twice as wide as the base: hidden matrices begin sqrt(2) times smaller; what is no matrix of
    a block, and what is copied, stays.
    """
    base = tiny()
    config = multiplied(base, wider(base))
    target = replace(config, n_layers=4)
    plain = operator("frozen-substrate").growth(config, target)
    growth = Multiplied(plain, target, initial_scales(base, target))
    model = Decoder(config)
    model.load_state_dict({n: torch.ones_like(p) for n, p in model.state_dict().items()})
    new, alike = all_grown(growth, model), all_grown(plain, model)
    for name, state in new.items():
        fresh = name.startswith(("blocks.2", "blocks.3")) and "norm" not in name
        factor = 2**-0.5 if fresh else 1.0
        torch.testing.assert_close(state["weight"], alike[name]["weight"] * factor)
        torch.testing.assert_close(state["exp_avg"], alike[name]["exp_avg"])
        assert (growth.local_source(name) == name) is not fresh or "norm" in name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("times", [2, 3])
def test_an_export_has_the_logits_and_knows_no_multiplier(
    tied: bool, times: int, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    config, model = source_of("llama", tied_embeddings=tied)
    target, growth = growth_of("hypercloning", config, wider(config, times))
    new = larger(growth, model)
    to_hf(new.state_dict(), target, None, tmp_path)
    text = json.loads((tmp_path / "config.json").read_text())
    assert text["model_type"] == "llama"
    assert not [key for key in text if "multiplier" in key or "logits_scaling" in key]
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = some_tokens(config, 2, 17)
    with torch.no_grad():
        logits = new(tokens)
        torch.testing.assert_close(exported(tokens).logits, logits, atol=1e-5, rtol=1e-6)
        back, weights = from_hf(tmp_path)
        assert back.output_multiplier == 1.0
        torch.testing.assert_close(loaded(back, weights)(tokens), logits, atol=1e-5, rtol=1e-6)


def test_a_model_without_a_multiplier_is_exported_as_it_is() -> None:
    config, model = source_of("llama")
    state = model.state_dict()
    assert folded(state, config) == (state, config)
    half, config = folded(state, replace(config, output_multiplier=0.5))
    assert config.output_multiplier == 1.0
    assert torch.equal(half["norm.weight"], state["norm.weight"] / 2)
    assert all(half[name] is state[name] for name in state if name != "norm.weight")


def test_a_growth_that_is_told_nothing_of_multipliers_is_refused() -> None:
    config, _ = source_of("llama")
    told = operator("hypercloning").problems(config, multiplied(config, wider(config)))
    assert [problem.setting for problem in told] == ["output_multiplier"]
