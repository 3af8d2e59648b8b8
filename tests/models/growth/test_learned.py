"""Learned maps, and pruning: what they begin as, what is learned, and that the source stays."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.growth.growth import grow, grown
from motet.models.growth.learned import LearnedGrowth, learn
from motet.models.growth.ligo import Ligo
from motet.models.growth.mango import Mango
from motet.models.growth.prune import depth_scores, distilled_loss
from motet.models.growth.registry import operator
from motet.parallel.engines.channel_order import measured
from tests.models.families import some_tokens
from tests.models.growth.growing import (
    EXACT,
    KINDS,
    all_grown,
    apart,
    language,
    larger,
    loaded,
    refusal,
    source_of,
    states,
    train,
)
from tests.models.growth.test_width import wider


def batches(config: ModelConfig, steps: int) -> list[tuple[Tensor, Tensor]]:
    every = [language(config.vocabulary_size, 8, 17, 100 + step) for step in range(steps)]
    return [(tokens[:, :-1], tokens[:, 1:]) for tokens in every]


def loss_of(model: Decoder, of: tuple[Tensor, Tensor]) -> float:
    with torch.no_grad():
        sums = model(*of, mode="loss")
    return float(sums.cross_entropy / sums.n_labels)


@pytest.mark.parametrize("kind", KINDS)
def test_ligo_begins_as_copies_when_its_maps_have_no_noise(kind: str) -> None:
    config, model = source_of(kind)
    for how in ("stream", "queries", "all"):
        target = wider(config, how)
        growth = operator("ligo", noise=0.0).growth(config, target)
        exact = grown(operator("bert2bert-fpi").growth(config, target), model.state_dict())
        for name, weight in grown(growth, model.state_dict()).items():
            torch.testing.assert_close(weight, exact[name], msg=name)
    deep = replace(wider(config, "all"), n_layers=4)
    both = operator("bert2bert-fpi+stack").growth(config, deep)
    growth = operator("ligo", noise=0.0).growth(config, deep)
    wanted = grown(both, model.state_dict())
    for name, weight in grown(growth, model.state_dict()).items():
        torch.testing.assert_close(weight, wanted[name], msg=name)


def test_ligo_follows_its_formula() -> None:
    """W' = B_out (sum of w W) B_in^T, B tied along the stream, gain' = B gain."""
    config, model = source_of("llama", n_kv_heads=4, d_ffn=24)
    target = replace(config, d_model=40, n_layers=3, n_heads=5, n_kv_heads=5, d_ffn=32)
    growth = operator("ligo", begin="noise", seed=1).growth(config, target)
    assert isinstance(growth, Ligo)
    maps, old = dict(growth.maps.named_parameters()), model.state_dict()
    new = {name: state["weight"] for name, state in all_grown(growth, model).items()}
    stream, hidden = maps["map-stream"], maps["map-hidden-24-32"]
    heads = torch.kron(maps["map-queries"], torch.eye(8))
    values = torch.kron(maps["map-values"], torch.eye(8))
    assert "map-mixed" not in maps
    assert not [name for name in maps if name.endswith("read")]
    for rest, out, into in (
        ("attention.q_proj.weight", heads, stream),
        ("attention.v_proj.weight", values, stream),
        ("attention.o_proj.weight", stream, values),
        ("feed_forward.down_proj.weight", stream, hidden),
    ):
        mix = maps[f"mix.{rest}".replace(".", "-")]
        for layer in range(3):
            mixed = sum(mix[layer, at] * old[f"blocks.{at}.{rest}"] for at in range(2))
            torch.testing.assert_close(new[f"blocks.{layer}.{rest}"], out @ mixed @ into.T)
    torch.testing.assert_close(new["norm.weight"], stream @ old["norm.weight"])
    torch.testing.assert_close(new["head.weight"], old["head.weight"] @ stream.T)


@pytest.mark.parametrize("kind", ["llama", "olmo2", "qwen3-tied", "experts"])
def test_mango_begins_near_copies_and_follows_its_ring(kind: str) -> None:
    config, model = source_of(kind, d_ffn=64, d_expert=32 if kind == "experts" else None)
    widths = {"d_ffn": 128, "d_expert": 64 if kind == "experts" else None}
    heads = {"n_heads": 8, "n_kv_heads": 2 * config.n_kv_heads, "head_dim": 8}
    target = replace(config, d_model=64, **heads, **widths)
    growth = operator("mango", noise=0.0).growth(config, target)
    assert apart(growth, model) <= EXACT
    deep = replace(target, n_layers=4)
    ring = operator("mango", noise=0.1, rank=2).growth(config, deep)
    assert isinstance(ring, Mango)
    maps = dict(ring.maps.named_parameters())
    old = {name: {"weight": value} for name, value in model.state_dict().items()}
    stack = ring._stack(old.__getitem__)
    wanted = torch.zeros(64, 64)
    for r, s, u, t in itertools.product(range(2), repeat=4):
        mixed = torch.zeros(32, 32)
        for layer, block in itertools.product(*(range(n) for n in stack.shape[:2])):
            share = maps["blocks"][r, 0, block, s] * maps["layers"][t, 3, layer, r]
            mixed += (share * stack[layer, block]).detach()
        rows, columns = (maps[name].detach() for name in ("rows", "columns"))
        wanted += rows[s, :, :, u] @ mixed @ columns[u, :, :, t].T
    made = ring.make("blocks.3.attention.q_proj.weight", old.__getitem__)["weight"]
    torch.testing.assert_close(made, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ligo", "mango"])
def test_maps_learn_and_the_source_stays_as_it_was(name: str) -> None:
    config, model = source_of("llama", vocabulary_size=32, d_ffn=64, init_std=0.1)
    train(model, torch.optim.Adam(model.parameters(), 0.01), 30)
    heads = {"n_heads": 8, "n_kv_heads": 4, "head_dim": 8}
    target = replace(config, d_model=64, d_ffn=128, n_layers=4, **heads)
    before = {n: w.clone() for n, w in model.state_dict().items()}
    growth = operator(name, seed=2).growth(config, target)
    assert isinstance(growth, LearnedGrowth)
    test = batches(config, 41)[40]
    start = loss_of(larger(growth, model), test)
    losses = learn(growth, model.state_dict(), batches(config, 15), lr=3e-3)
    end = loss_of(larger(growth, model), test)
    assert losses[0] > losses[-1]
    assert end < start - 0.05
    assert all(torch.equal(before[n], w) for n, w in model.state_dict().items())
    # All there is to keep is the maps.
    again = operator(name, seed=9).growth(config, target)
    assert isinstance(again, LearnedGrowth)
    again.maps.load_state_dict(growth.maps.state_dict())
    both = [grown(one, model.state_dict()) for one in (growth, again)]
    assert all(torch.equal(both[0][n], both[1][n]) for n in both[0])
    new = dict(grow(growth, states(model)))
    assert all(state["step"] == 0 and not state["exp_avg"].any() for state in new.values())
    assert set(new) == {weight.name for weight in named_weights(target)}


def test_pruning_keeps_what_matters_and_learns_from_the_whole_model() -> None:
    config, model = source_of("llama", vocabulary_size=32, d_ffn=64, init_std=0.1)
    train(model, torch.optim.Adam(model.parameters(), 0.01), 60)
    tokens, labels = batches(config, 1)[0]
    # The scores that nested families order their channels by.
    scores = measured(model, 0, lambda: model(tokens), SimpleNamespace(size=1))  # type: ignore[arg-type]
    narrow = {"d_model": 24, "n_heads": 2, "n_kv_heads": 1, "head_dim": 8}
    every = replace(config, d_ffn=32, n_layers=1, **narrow)
    scores |= depth_scores(model, lambda: model(tokens))
    assert larger(operator("prune", scores=scores).growth(config, every), model).config == every
    target = replace(config, d_ffn=32)
    pruned = larger(operator("prune", scores=scores).growth(config, target), model)
    down = "blocks.1.feed_forward.down_proj.weight"
    best = sorted(range(64), key=lambda i: -scores["blocks.1.hidden"][i])[:32]
    assert torch.equal(pruned.state_dict()[down], model.state_dict()[down][:, best])
    worst = {axis: [-value for value in values] for axis, values in scores.items()}
    other = larger(operator("prune", scores=worst).growth(config, target), model)
    losses = [loss_of(one, (tokens, labels)) for one in (model, pruned, other)]
    assert losses[0] < losses[1] < losses[2]
    optimizer = torch.optim.Adam(pruned.parameters(), 3e-3)
    divergences = []
    for batch in batches(config, 12):
        sums = distilled_loss(pruned, model, *batch)
        optimizer.zero_grad()
        (sums.objective / sums.n_labels).backward()
        optimizer.step()
        divergences.append(float(sums.divergence / sums.n_labels))
    assert divergences[-1] < 0.7 * divergences[0]
    log_p, log_q = (one(tokens).log_softmax(-1) for one in (model, pruned))
    divergence = functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    sums = distilled_loss(pruned, model, tokens, labels)
    torch.testing.assert_close(sums.divergence, divergence, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_prune_of_what_was_grown_in_gives_the_source_back(kind: str) -> None:
    """Copies score less than their originals, so they go; moments of what stays are its own."""
    config, model = source_of(kind)
    target = replace(
        wider(config, "all"), n_layers=4, **({} if config.n_experts else {"d_ffn": 96})
    )
    if config.n_experts:
        target = replace(target, d_expert=config.d_expert)
    grown_ = operator("sparkling+identity", moments="tile").growth(config, target)
    large = dict(grow(grown_, states(model)))
    scores: dict[str, list[float]] = {"stream": [-float(i) for i in range(target.d_model)]}
    first = [1.0, 1.0, 0.0, 0.0] if config.moe_every == 2 else [1.0, 0.0, 1.0, 0.0]
    scores["layers"] = first
    for layer in range(4):
        sizes = {"heads": target.n_kv_heads, "hidden": target.d_ffn, "shared": target.shared_width}
        for axis, size in sizes.items():
            scores[f"blocks.{layer}.{axis}"] = [-float(i) for i in range(size)]
    back = dict(
        grow(operator("prune", moments="keep", scores=scores).growth(target, config), large.items())
    )
    old = dict(states(model))
    for name in ("blocks.1.attention.q_proj.weight", "blocks.1.attention_norm.weight"):
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(back[name][key], old[name][key], msg=name)
    assert {n: s["weight"].shape for n, s in back.items()} == {
        n: s["weight"].shape for n, s in old.items()
    }


def test_queries_are_pruned_inside_their_groups() -> None:
    config, model = source_of("llama", n_heads=8, n_kv_heads=2, head_dim=8)
    target = replace(config, n_heads=2, n_kv_heads=1, head_dim=8)
    scores = {f"blocks.{i}.queries": [0.1, 0.5, 0.2, 0.3, 0.9, 0.1, 0.95, 0.4] for i in range(2)}
    scores |= {f"blocks.{i}.heads": [0.0, 1.0] for i in range(2)}
    pruned = larger(operator("prune", scores=scores).growth(config, target), model).state_dict()
    name = "blocks.0.attention.{}_proj.weight"
    rows = model.state_dict()[name.format("q")].unflatten(0, (8, 8))
    assert torch.equal(pruned[name.format("q")].unflatten(0, (2, 8)), rows[[6, 4]])
    columns = model.state_dict()[name.format("o")].unflatten(1, (8, 8))
    assert torch.equal(pruned[name.format("o")].unflatten(1, (2, 8)), columns[:, [6, 4]])
    assert torch.equal(pruned[name.format("k")], model.state_dict()[name.format("k")][8:])


def test_layers_that_turn_nothing_score_nothing() -> None:
    config, model = source_of("llama")
    growth = operator("identity").growth(config, replace(config, n_layers=4))
    deep = larger(growth, model)
    scores = depth_scores(deep, lambda: deep(some_tokens(config, 2, 12)))
    layers = scores["layers"]
    assert layers[1] == pytest.approx(0, abs=1e-6)
    assert layers[3] == pytest.approx(0, abs=1e-6)
    assert min(layers[0], layers[2]) > 0.01
    back = operator("prune", scores=scores).growth(growth.target, config)
    old = model.state_dict()
    assert all(torch.equal(w, old[n]) for n, w in grown(back, deep.state_dict()).items())
    assert len(scores["blocks.0.queries"]) == config.n_heads
    assert loaded(config, grown(back, deep.state_dict())) is not None


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("prune", {}, {"d_ffn": 24}, "blocks.0.hidden has 0 scores, and 48 are needed"),
    ("prune", {}, {"d_ffn": 96}, "is more than the 48 there are; prune takes less"),
    ("prune", {}, {"n_layers": 1}, "layers has 0 scores"),
    ("ligo", {}, {"d_ffn": 24}, "would shrink from 48 to 24"),
    ("mango", {"layer_ffn": (32, 48)}, {"n_layers": 4, "layer_ffn": (32, 48, 32, 48)}, "take ligo"),
    ("mango", {}, {"n_heads": 8, "head_dim": 8}, "keep 2 queries per key-value head"),
]


@pytest.mark.parametrize(("name", "old", "new", "told"), REFUSED)
def test_what_cannot_be_learned_or_pruned_is_refused(
    name: str, old: dict[str, Any], new: dict[str, Any], told: str
) -> None:
    assert told in refusal(name, old, new)
    config, _ = source_of("llama", **old)
    with pytest.raises(ModelError, match="mixed weights have no moments"):
        operator("ligo", moments="keep").growth(config, replace(config, n_layers=4, layer_ffn=None))
