"""Operators that widen: what they compute, what becomes of moments, and whether copies part."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from motet.models.architecture import named_weights
from motet.models.config import ModelConfig, ModelError
from motet.models.decoder import Decoder
from motet.models.growth.axes import Copies, copies
from motet.models.growth.growth import grow
from motet.models.growth.operator import GrowthOperator
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState, weights_of
from tests.models.families import some_tokens
from tests.models.growth.growing import (
    EXACT,
    KINDS,
    adamw,
    all_grown,
    apart,
    loaded,
    source_of,
    states,
    train,
)

WIDER: dict[str, dict[str, Any]] = {
    "stream": {"d_model": 64, "head_dim": 8},
    "queries": {"n_heads": 8, "head_dim": 8},
    "heads": {"n_heads": 12, "n_kv_heads": 4, "head_dim": 8},
    "hidden": {"d_ffn": 96, "d_expert": 48, "d_shared": 48},
    "all": {
        "d_model": 96,
        "n_heads": 8,
        "n_kv_heads": 4,
        "head_dim": 8,
        "d_ffn": 96,
        "d_expert": 32,
        "d_shared": 72,
    },
}


def wider(config: ModelConfig, how: str) -> ModelConfig:
    changes = dict(WIDER[how])
    if "n_kv_heads" in changes or how == "queries":
        kv = config.n_kv_heads * 2 if "n_kv_heads" in changes else config.n_kv_heads
        # Twice the queries of a group for "queries"; three times the queries, in twice the groups
        # where groups allow it.
        ratio = config.n_heads // config.n_kv_heads
        ratio *= {"queries": 2, "heads": 2, "all": 1}[how]
        changes |= {"n_kv_heads": kv, "n_heads": kv * ratio}
    if not config.n_experts:
        changes = {k: v for k, v in changes.items() if k not in ("d_expert", "d_shared")}
    if not config.n_shared_experts:
        changes.pop("d_shared", None)
    if config.n_experts and config.moe_every == 1:
        changes.pop("d_ffn", None)
    return replace(config, **changes)


def pairs() -> list[Any]:
    every = [(kind, how) for kind in KINDS for how in WIDER]
    return [pair for pair in every if pair != ("experts", "hidden-only")]


@pytest.mark.parametrize(("kind", "how"), pairs())
def test_clones_compute_what_their_source_computes(kind: str, how: str) -> None:
    config, model = source_of(kind)
    target = wider(config, how)
    for name, options in (
        ("hypercloning", {}),
        ("hypercloning", {"noise": 0.5}),
        ("bert2bert-fpi", {}),
        ("sparkling", {}),
        ("hypercloning+identity", {"noise": 0.5}),
    ):
        deep = replace(target, n_layers=4) if "+" in name else target
        growth = operator(name, **options).growth(config, deep)
        assert growth.exact
        assert apart(growth, model) <= EXACT, name


FACTORS = st.integers(1, 3)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(KINDS)), st.tuples(*[FACTORS] * 6), st.integers(0, 3), st.booleans())
def test_any_whole_factors_are_exact(
    kind: str, factors: tuple[int, ...], added: int, noisy: bool
) -> None:
    stream, keys, queries, hidden, expert, shared = factors
    config, model = source_of(kind, d_model=16, n_heads=4, d_ffn=8, head_dim=4)
    changes: dict[str, Any] = {"d_model": config.d_model * stream}
    changes["n_kv_heads"] = config.n_kv_heads * keys
    changes["n_heads"] = config.n_heads * keys * queries
    if config.n_moe_layers < config.n_layers:
        changes["d_ffn"] = config.d_ffn * hidden
    if config.n_experts:
        changes["d_expert"] = config.expert_width * expert
    if config.shared_width:
        changes["d_shared"] = config.shared_width * shared
    wide = replace(config, **changes)
    target = replace(wide, n_layers=config.n_layers + added * config.moe_every)
    assume(target != config)
    parts = [*(["hypercloning"] * (wide != config)), *(["identity"] * (added > 0))]
    options = {"noise": 0.3} if noisy and wide != config else {}
    growth = operator("+".join(parts), **options).growth(config, target)
    assert growth.exact
    assert apart(growth, model) <= EXACT


@pytest.mark.parametrize("kind", ["qwen2", "qwen3-tied"])
def test_a_head_that_is_untied_computes_the_same(kind: str) -> None:
    config, model = source_of(kind, tied_embeddings=True)
    for name, changes in (
        ("hypercloning", WIDER["stream"]),
        ("identity", {"n_layers": 4}),
        ("bert2bert-fpi+identity", WIDER["stream"] | {"n_layers": 4}),
    ):
        growth = operator(name).growth(config, replace(config, tied_embeddings=False, **changes))
        assert apart(growth, model) <= EXACT, name


def test_a_tied_head_keeps_its_scale_in_the_last_norm() -> None:
    """Where the head stays the embedding, tiles of both double the logits: the last norm halves
    them. (Elsewhere the head was untied without a word, or its scale lost.)
    """
    config, model = source_of("qwen3-tied")
    growth = operator("hypercloning").growth(config, wider(config, "stream"))
    new = all_grown(growth, model)
    old = model.state_dict()
    assert "head.weight" not in new
    assert torch.equal(new["norm.weight"]["weight"], old["norm.weight"].repeat(2) / 2)
    assert torch.equal(new["embedding.weight"]["weight"], old["embedding.weight"].repeat(1, 2))
    block = "blocks.0.attention_norm.weight"
    assert torch.equal(new[block]["weight"], old[block].repeat(2))


@pytest.mark.parametrize(("kind", "how"), pairs())
def test_moments_follow_the_gradient_exactly(kind: str, how: str) -> None:
    """With gradients in place of moments, what `keep` gives is the gradient of the grown model."""
    config, model = source_of(kind)
    growth = operator("hypercloning").growth(config, wider(config, how))
    tokens = some_tokens(config, 2, 12)

    def gradients(of: Decoder) -> dict[str, Tensor]:
        of.zero_grad()
        of(tokens).sin().sum().backward()
        return {name: p.grad for name, p in of.named_parameters() if p.grad is not None}

    def state(name: str, weight: Tensor) -> WeightState:
        g = old[name]
        return {"weight": weight, "exp_avg": g, "exp_avg_sq": g.square(), "step": torch.tensor(3.0)}

    old = gradients(model)
    new = dict(grow(growth, [(n, state(n, w)) for n, w in model.state_dict().items()]))
    found = gradients(loaded(growth.target, weights_of(new.items())))
    for name, gradient in found.items():
        size = float(gradient.abs().max())
        torch.testing.assert_close(new[name]["exp_avg"], gradient, atol=2e-4 * size, rtol=1e-4)
        squares = gradient.square()
        torch.testing.assert_close(new[name]["exp_avg_sq"], squares, atol=4e-4 * size**2, rtol=1e-3)
        assert new[name]["step"] == 3


def test_query_heads_are_copied_inside_their_groups() -> None:
    """apple/ml-hypercloning issue 1: with key-value heads as they were, [q0 q1 q2 q3] became
    [q0 q1 q2 q3 q0 q1 q2 q3], and half of the copies read other keys.
    """
    keys, inner = copies(2, 2), copies(2, 4)
    assert keys.within(inner).index_N.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert keys.within(inner).old_N.tolist() == [True, True, False, False] * 2
    assert copies(2, 4).within(copies(2, 2)).index_N.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    config, model = source_of("llama", n_heads=4, n_kv_heads=2)
    growth = operator("hypercloning").growth(config, wider(config, "queries"))
    rows = all_grown(growth, model)["blocks.0.attention.q_proj.weight"]["weight"].unflatten(
        0, (8, 8)
    )
    heads = model.state_dict()["blocks.0.attention.q_proj.weight"].unflatten(0, (4, 8))
    assert torch.equal(rows, heads[[0, 1, 0, 1, 2, 3, 2, 3]])


def test_queries_keys_and_values_grow_each_by_itself() -> None:
    """prts appended rows at the end of one fused matrix, which then split elsewhere."""
    config, model = source_of("qwen2")
    growth = operator("bert2bert-fpi").growth(config, wider(config, "heads"))
    new, old = all_grown(growth, model), model.state_dict()
    for part, heads in (
        ("q", [0, 1, 0, 1, 2, 3, 2, 3, 0, 1, 0, 1, 2, 3, 2, 3]),
        ("k", [0, 1, 0, 1]),
        ("v", [0, 1, 0, 1]),
    ):
        for kind in ("weight", "bias"):
            name = f"blocks.1.attention.{part}_proj.{kind}"
            rows = old[name].unflatten(0, (-1, 8))[heads]
            assert torch.equal(new[name]["weight"], rows.flatten(0, 1)), name


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(["cyclic", "random"]),
)
def test_maps_of_indices_keep_every_old_one_and_add_up(
    size: int, more: int, groups: int, width: int, chosen: str
) -> None:
    grown = copies(size, size + more, chosen, "a test", groups)
    assert grown.index_N[:size].tolist() == list(range(size))
    assert grown.old_N.tolist() == [True] * size + [False] * more
    assert grown.even or chosen == "random" or more % size
    both = copies(groups, 2 * groups).within(grown)
    for made in (grown, both, both.channels(width)):
        assert sorted(set(made.index_N.tolist())) == list(range(made.size))
        assert made.index_N[made.old_N].tolist() == list(range(made.size))
        counts = torch.bincount(made.index_N, minlength=made.size).float()
        assert torch.equal(made.counts_N, counts[made.index_N])
        ones = torch.zeros(made.size)
        reading = made.inputs()
        ones.index_add_(0, reading.index_NS[:, 0], reading.value_NS[:, 0])
        torch.testing.assert_close(ones, torch.ones(made.size))
        shares = torch.zeros(made.size)
        shares.index_add_(0, made.index_N, made.outputs().moment_NS[:, 0])
        torch.testing.assert_close(shares, torch.ones(made.size))
    # A copy of a query head reads a copy of its own key-value head.
    per_group = len(grown.index_N)
    group = torch.arange(len(both.index_N)) // per_group
    assert torch.equal(both.index_N // size, copies(groups, 2 * groups).index_N[group])


def hand(copied: list[int], counts: list[float], w: Tensor) -> Tensor:
    return w[:, copied] / torch.tensor(counts)


def test_inexact_widths_follow_the_published_formulas() -> None:
    """FPI: W[:, g] / count(g); AKI: rows beyond the old ones from the next layer; SPARKLING:
    W[:, g] / sqrt(1 + 3 c) below twice the width.
    """
    config, model = source_of("llama", d_ffn=6, n_heads=2, n_kv_heads=1, head_dim=16)
    target = replace(config, d_ffn=8)
    old = model.state_dict()
    down, gate = "blocks.0.feed_forward.down_proj.weight", "blocks.0.feed_forward.gate_proj.weight"
    after = gate.replace("blocks.0", "blocks.1")
    g = [0, 1, 2, 3, 4, 5, 0, 1]
    counts = [2.0, 2, 1, 1, 1, 1, 2, 2]
    made = {
        name: all_grown(operator(name).growth(config, target), model)
        for name in ("bert2bert-fpi", "bert2bert-aki", "sparkling")
    }
    for name in ("bert2bert-fpi", "bert2bert-aki"):
        torch.testing.assert_close(made[name][down]["weight"], hand(g, counts, old[down]))
    assert torch.equal(made["bert2bert-fpi"][gate]["weight"], old[gate][g])
    rows = torch.cat([old[gate], old[after][:2]])
    assert torch.equal(made["bert2bert-aki"][gate]["weight"], rows)
    last = made["bert2bert-aki"][after]["weight"]
    assert torch.equal(last, old[after][g])  # no layer comes after it
    scale = [(1 + 3 * (2 / 6)) ** 0.5] * 8
    torch.testing.assert_close(made["sparkling"][down]["weight"], hand(g, scale, old[down]))
    # Hidden channels alone may be copied unevenly, the stream not: a norm's mean would move.
    for name, changes, exact in (
        ("bert2bert-fpi", {"d_ffn": 8}, True),
        ("bert2bert-fpi", {"d_model": 48}, False),
        ("bert2bert-fpi", {"d_model": 64}, True),
        ("bert2bert-aki", {"d_ffn": 12}, False),
        ("sparkling", {"d_ffn": 8}, False),
        ("sparkling", {"d_ffn": 12}, True),
    ):
        growth = operator(name).growth(config, replace(config, **changes))
        assert growth.exact == exact
        assert (apart(growth, model) <= EXACT) == exact, (name, changes)


def test_rescaled_copies_keep_the_size_of_activations() -> None:
    config, _ = source_of("llama", d_ffn=256)
    model = Decoder(config)
    generator = torch.Generator().manual_seed(0)
    old = {n: torch.randn(w.shape, generator=generator) for n, w in model.state_dict().items()}
    name = "blocks.0.feed_forward.down_proj.weight"
    grown = copies(256, 384)
    hidden = torch.randn(2000, 256, generator=generator)
    for op, near in (("sparkling", 0.03), ("bert2bert-fpi", 0.12)):
        growth = operator(op).growth(config, replace(config, d_ffn=384))
        down = growth.make(name, lambda n: {"weight": old[n]})["weight"]
        size = (hidden[:, grown.index_N] @ down.T).square().mean().sqrt()
        before = (hidden @ old[name].T).square().mean().sqrt()
        assert abs(size / before - 1) < near


def test_the_next_layer_lends_rows_and_moments_inside_groups_of_queries() -> None:
    config, model = source_of("qwen2")
    growth = operator("bert2bert-aki", moments="tile").growth(config, wider(config, "queries"))
    old, new = dict(states(model)), all_grown(growth, model)
    name, after = (f"blocks.{layer}.attention.q_proj.bias" for layer in (0, 1))
    for key in ("weight", "exp_avg", "exp_avg_sq"):
        mine, next_ = (old[n][key].unflatten(0, (4, 8)) for n in (name, after))
        rows = torch.stack(
            [mine[0], mine[1], next_[0], next_[1], mine[2], mine[3], next_[2], next_[3]]
        )
        torch.testing.assert_close(new[name][key], rows.flatten())
    assert growth.sources(name) == (name, after)


def test_the_asymmetric_reset_keeps_the_old_part_and_names_the_new_one() -> None:
    config, model = source_of("qwen3-tied")
    growth = operator("sparkling").growth(config, wider(config, "all"))
    old, new = dict(states(model)), all_grown(growth, model)
    for weight in named_weights(growth.target):
        mask = growth.new_elements(weight.name)
        state, was = new[weight.name], old[weight.name]
        assert state["step"] == 7
        if mask is None:
            assert "head" in weight.axes
            continue
        assert not state["exp_avg"][mask].any()
        assert not state["exp_avg_sq"][mask].any()
        torch.testing.assert_close(state["exp_avg"][~mask], was["exp_avg"].flatten())
        torch.testing.assert_close(state["exp_avg_sq"][~mask], was["exp_avg_sq"].flatten())


def _parted(how: GrowthOperator, steps: int = 40) -> float:
    """How far copies are apart after some steps, over the size of the weight."""
    config, model = source_of(
        "llama", d_model=16, n_heads=2, n_kv_heads=1, d_ffn=16, vocabulary_size=32
    )
    start = dict(states(model))
    for state in start.values():
        state |= {
            "exp_avg": 0 * state["exp_avg"],
            "exp_avg_sq": 0 * state["exp_avg"],
            "step": torch.tensor(0.0),
        }
    optimizer = adamw(start, model, 0.01)
    train(model, optimizer, 20)
    trained = {
        name: {"weight": p.detach(), **optimizer.state[p]} for name, p in model.named_parameters()
    }
    target = replace(config, d_model=32, head_dim=8, d_ffn=32, n_heads=4, n_kv_heads=2)
    growth = how.growth(config, target)
    new = dict(grow(growth, trained.items()))
    larger = loaded(target, weights_of(new.items()))
    train(larger, adamw(new, larger, 0.01), steps, seed=20)
    weight = larger.state_dict()["blocks.0.feed_forward.gate_proj.weight"]
    first, second = weight.chunk(2)
    return float((first - second).norm() / first.norm())


def test_copies_part_with_noise_or_an_asymmetric_reset_and_never_without() -> None:
    """Where copies have the same state they have the same gradient: they stay one channel for ever
    (arXiv:2602.02472), with dropped, tiled and kept moments alike.
    """
    for rule in ("drop", "tile", "keep"):
        assert _parted(operator("hypercloning", moments=rule)) < 1e-3, rule
    for how in (
        operator("sparkling"),
        operator("hypercloning", noise=0.3),
        operator("bert2bert-aki"),
    ):
        assert _parted(how) > 0.1, how


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (
        "hypercloning",
        {"d_model": 48, "head_dim": 8},
        "d_model: 48 (stream) is not a whole number of times 32",
    ),
    ("hypercloning", {"d_ffn": 24}, "24 is less than the 48 there are"),
    (
        "hypercloning",
        {"n_heads": 8, "n_kv_heads": 8, "head_dim": 8},
        "keep n_heads / n_kv_heads at 2",
    ),
    ("hypercloning", {"d_model": 64}, "set head_dim=8"),
    ("hypercloning", {"d_ffn": 96, "n_layers": 4}, "n_layers: 2 cannot become 4"),
    ("hypercloning", {"d_ffn": 96, "n_experts": 4}, "n_experts: 0 cannot become 4"),
    ("bert2bert-fpi+stack", {"d_ffn": 96}, "both configs are the same; change one of n_layers"),
    ("bert2bert-fpi+stack", {"d_ffn": 48, "n_layers": 4}, "both configs are the same"),
]


@pytest.mark.parametrize(("name", "changes", "told"), REFUSED)
def test_widths_that_cannot_be_are_refused_with_what_would_work(
    name: str, changes: dict[str, Any], told: str
) -> None:
    config, _ = source_of("llama")
    with pytest.raises(ModelError) as caught:
        operator(name).growth(config, replace(config, **changes))
    assert told in str(caught.value)


def test_width_and_depth_grow_in_one_pass() -> None:
    config, model = source_of("shared-tied")
    target = replace(wider(config, "all"), n_layers=4)
    growth = operator("bert2bert-fpi+stack", moments="keep").growth(config, target)
    new = all_grown(growth, model)
    assert set(new) == {weight.name for weight in named_weights(target)}
    for name, state in new.items():
        if name.startswith("blocks.3."):
            twin = new[name.replace("blocks.3.", "blocks.1.")]
            assert all(torch.equal(state[key], twin[key]) for key in state)
    assert not growth.exact
    mask = growth.new_elements("blocks.3.attention.q_proj.weight")
    assert mask is not None
    assert int((~mask).sum()) == 32 * 32


def test_copies_is_a_value_without_hidden_state() -> None:
    first, second = (copies(4, 9, "random", "x", 1) for _ in range(2))
    assert torch.equal(first.index_N, second.index_N)
    assert isinstance(first, Copies)
    assert not torch.equal(first.index_N, copies(4, 9, "random", "x", 2).index_N)
