"""The V-cycle, and mixtures of experts from dense models."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from motet.models.config import ModelConfig, ModelError
from motet.models.growth.growth import grow
from motet.models.growth.multilevel import blended, digests
from motet.models.growth.registry import operator
from motet.models.growth.state import weights_of
from motet.models.growth.upcycling import mixture_of
from tests.models.families import some_tokens
from tests.models.growth.growing import (
    EXACT,
    KINDS,
    adamw,
    all_grown,
    apart,
    larger,
    loaded,
    refusal,
    source_of,
    states,
    train,
)
from tests.models.growth.test_width import wider


def doubled(config: ModelConfig, how: str) -> ModelConfig:
    return replace(wider(config, how), n_layers=2 * config.n_layers)


@pytest.mark.parametrize("kind", KINDS)
def test_coalescing_what_was_decoalesced_gives_it_back_with_its_moments(kind: str) -> None:
    config, model = source_of(kind)
    for how, embedding in (("stream", "mean"), ("all", "mean"), ("heads", "published")):
        if embedding == "published" and not config.tied_embeddings:
            embedding = "mean"
        options = {"moments": "keep", "embedding": embedding}
        up = operator("decoalesce", **options).growth(config, doubled(config, how))
        down = operator("coalesce", **options).growth(up.target, config)
        old = dict(states(model))
        back = dict(grow(down, grow(up, old.items())))
        assert set(back) == set(old)
        for name, state in old.items():
            for key, value in state.items():
                torch.testing.assert_close(back[name][key], value, msg=f"{name} {key}")


def test_levels_follow_the_published_formulas() -> None:
    config, model = source_of("qwen3-tied", n_layers=4)
    small = replace(config, d_model=16, head_dim=8, d_ffn=24, n_layers=2)
    new = all_grown(operator("coalesce").growth(config, small), model)
    old = model.state_dict()
    down = [old[f"blocks.{layer}.feed_forward.down_proj.weight"] for layer in (2, 3)]
    both = (down[0] + down[1]) / 2
    rows = (both[:16] + both[16:]) / 2  # written: means
    wanted = rows[:, :24] + rows[:, 24:]  # read: sums
    torch.testing.assert_close(new["blocks.1.feed_forward.down_proj.weight"]["weight"], wanted)
    gains = [old[f"blocks.{layer}.attention_norm.weight"] for layer in (0, 1)]
    mean = sum(g[:16] + g[16:] for g in gains) / 4
    torch.testing.assert_close(new["blocks.0.attention_norm.weight"]["weight"], mean)
    table = old["embedding.weight"]
    for embedding, sums in (("mean", 0.5), ("published", 1.0)):
        growth = operator("coalesce", embedding=embedding).growth(config, small)
        made = all_grown(growth, model)["embedding.weight"]
        torch.testing.assert_close(made["weight"], (table[:, :16] + table[:, 16:]) * sums)
        assert made["step"] == 0
        assert not made["exp_avg"].any()
        up = operator("decoalesce", embedding=embedding).growth(small, config)
        again = up.make("embedding.weight", lambda _, made=made: made)["weight"]
        torch.testing.assert_close(again, made["weight"].repeat(1, 2) * (1.0 if sums < 1 else 0.5))


def test_decoalescing_in_width_keeps_the_function_and_the_published_halves_do_not() -> None:
    """With a tied table halved, logits keep their scale, but blocks read half of the stream."""
    config, model = source_of("qwen3-tied")
    target = wider(config, "stream")
    growth = operator("decoalesce").growth(config, target)
    assert growth.exact
    assert apart(growth, model) <= EXACT
    published = operator("decoalesce", embedding="published").growth(config, target)
    assert not published.exact
    assert apart(published, model) > 1e-3


def test_the_cycle_blends_with_the_model_that_it_began_from_and_no_other() -> None:
    """The published script blends with a finished baseline's weights."""
    config, model = source_of("llama", n_layers=4)
    small = replace(config, d_model=16, head_dim=8, n_layers=2)
    began = dict(states(model))
    known = digests(began.items())
    down = all_grown(operator("coalesce").growth(config, small), model)
    back = list(grow(operator("decoalesce").growth(small, config), down.items()))
    new = dict(blended(began.__getitem__, known, back, alpha=0.25))
    name = "blocks.3.attention.o_proj.weight"
    wanted = 0.75 * began[name]["weight"] + 0.25 * dict(back)[name]["weight"]
    torch.testing.assert_close(new[name]["weight"], wanted)
    assert set(new) == set(began)
    assert all(state["step"] == 0 for state in new.values())
    rows = new[name]["weight"]
    assert float((rows[:16] - rows[16:]).norm() / rows.norm()) > 0.1  # copies have parted
    _, other = source_of("llama", n_layers=4)
    wrong = {n: {"weight": s["weight"] + 1e-6} for n, s in states(other)}
    with pytest.raises(
        ValueError, match=r"embedding\.weight is not that of the model that was coal"
    ):
        list(blended(wrong.__getitem__, known, back, alpha=0.25))
    with pytest.raises(ValueError, match=r"alpha=1\.5 is not a share"):
        list(blended(began.__getitem__, known, back, alpha=1.5))


UPCYCLED: dict[str, dict[str, Any]] = {
    "copies": {"n_experts": 4, "k": 2},
    "one each": {"n_experts": 4, "k": 1},
    "virtual groups": {"n_experts": 4, "k": 2, "granularity": 3},
}


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("how", UPCYCLED)
@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3-tied", "qwen2"])
def test_a_mixture_of_copies_computes_what_the_dense_model_does(
    kind: str, how: str, score: str
) -> None:
    """Dense and expert layers in turn: Megatron-LM's upcycling stopped at the first dense one."""
    config, model = source_of(kind)
    sizes = UPCYCLED[how]
    target = replace(mixture_of(config, **sizes), router_score=score, moe_every=2)
    growth = operator("upcycling", granularity=sizes.get("granularity", 1)).growth(config, target)
    assert growth.exact
    assert apart(growth, model) <= EXACT


def test_scales_without_normalized_weights_are_the_published_ones() -> None:
    """(expansion x G^2 / k)^(1/3) after softmax over all; G^(1/3) after top-k (Megatron-LM)."""
    config, model = source_of("llama")
    old = model.state_dict()
    for normalized, factor in ((False, 4 * 3 * 3 / (2 * 3)), (True, 3.0)):
        target = replace(mixture_of(config, 4, 2, 3), normalize_top_k=normalized)
        for scale in ("published", "down"):
            growth = operator("upcycling", granularity=3, scale=scale).growth(config, target)
            new = all_grown(growth, model)
            up = old["blocks.1.feed_forward.up_proj.weight"].unflatten(0, (3, 16))
            down = old["blocks.1.feed_forward.down_proj.weight"].unflatten(1, (3, 16))
            root = factor ** (1 / 3)
            experts = new["blocks.1.feed_forward.experts.up_proj"]["weight"]
            torch.testing.assert_close(experts[7], up[7 % 3] * (root if scale[0] == "p" else 1))
            experts = new["blocks.1.feed_forward.experts.down_proj"]["weight"]
            size = root if scale == "published" else factor
            torch.testing.assert_close(experts[7], down[:, 7 % 3] * size)
            assert growth.exact == (normalized and scale == "down")
            router = new["blocks.1.feed_forward.router.weight"]["weight"]
            assert torch.equal(router[3], router[5])
            assert not torch.equal(router[3], router[6])


def test_experts_share_the_gradient_of_the_feed_forward_and_part_in_training() -> None:
    config, model = source_of("llama", vocabulary_size=32)
    target = mixture_of(config, 4, 2)
    growth = operator("upcycling").growth(config, target)
    new = all_grown(growth, model)
    mixture = larger(growth, model)
    tokens = some_tokens(config, 4, 16)
    for one in (model, mixture):
        one.zero_grad()
        one(tokens).sin().sum().backward()
    dense = dict(model.named_parameters())["blocks.0.feed_forward.up_proj.weight"].grad
    experts = dict(mixture.named_parameters())["blocks.0.feed_forward.experts.up_proj"]
    assert dense is not None
    assert experts.grad is not None
    torch.testing.assert_close(
        experts.grad.sum(0), dense, rtol=1e-4, atol=1e-5 * float(dense.abs().max())
    )
    kept = all_grown(operator("upcycling", moments="keep").growth(config, target), model)
    was = dict(states(model))["blocks.0.feed_forward.up_proj.weight"]
    name = "blocks.0.feed_forward.experts.up_proj"
    torch.testing.assert_close(kept[name]["exp_avg"][2], was["exp_avg"] / 4)
    torch.testing.assert_close(kept[name]["exp_avg_sq"][2], was["exp_avg_sq"] / 16)
    assert new[name]["step"] == 0
    assert new["blocks.0.attention.q_proj.weight"]["step"] == 7
    balance = {n for n in growth.names() if n.startswith(("frequencies", "bias"))}
    assert {float(new[n]["value"][0]) for n in balance} == {0.25, 0.0}
    fresh = loaded(target, weights_of(new.items()))
    train(fresh, adamw(new, fresh, 0.01), 15)
    after = dict(fresh.named_parameters())[name].detach()
    assert float((after[0] - after[1]).norm() / after[0].norm()) > 0.1


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("coalesce", {}, {"d_ffn": 20}, "d_ffn: 48 (hidden) is not a whole number of times 20"),
    ("coalesce", {}, {"d_ffn": 96}, "the large model has 48 (hidden), the small one 96"),
    ("decoalesce", {}, {"n_layers": 3}, "n_layers: 3 is not a whole number of times 2"),
    ("upcycling", {}, {"d_ffn": 64}, "n_experts: 0 makes no mixture"),
    ("upcycling", {}, {"n_experts": 4, "d_expert": 24}, "set d_expert=48"),
    (
        "upcycling",
        {},
        {"n_experts": 4, "router_score": "sigmoid", "normalize_top_k": False},
        "normalize_top_k: is false",
    ),
    (
        "upcycling",
        {},
        {"n_experts": 4, "n_shared_experts": 1},
        "n_shared_experts: 0 cannot become 1",
    ),
    ("upcycling", {"n_experts": 4}, {"n_experts": 8}, "the old model has 4 already"),
]


@pytest.mark.parametrize(("name", "old", "new", "told"), REFUSED)
def test_levels_and_mixtures_that_cannot_be_are_refused(
    name: str, old: dict[str, Any], new: dict[str, Any], told: str
) -> None:
    assert told in refusal(name, old, new)
    config, _ = source_of("llama", **old)
    with pytest.raises(ModelError, match="multiple of granularity=3"):
        mixture = replace(config, n_experts=4, experts_per_token=2, d_expert=16)
        operator("upcycling", granularity=3).growth(replace(config, n_experts=0), mixture)
