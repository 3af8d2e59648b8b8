"""Operators that add layers: which layer stands where, what its optimizer state is, and what is
refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from motet.models.architecture import named_weights
from motet.models.config import ModelError
from motet.models.decoder import initial_value
from motet.models.growth.depth import appended, first_copies, interpolated, stacked
from motet.models.growth.growth import grow
from motet.models.growth.registry import operator
from motet.models.growth.state import WeightState, weights_of
from tests.models.growth.growing import (
    KINDS,
    MOE,
    adamw,
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

DEPTH = ("stack", "interpolate", "identity", "frozen-substrate", "incremental")


@given(st.integers(1, 12), st.integers(1, 24), st.integers(1, 3))
def test_layers_stand_where_the_papers_put_them(depth: int, added: int, period: int) -> None:
    wanted = depth + added
    stack, between, top = (f(depth, wanted) for f in (stacked, interpolated, appended))
    assert stack == [i % depth for i in range(wanted)]
    assert between == [i * depth // wanted for i in range(wanted)] == sorted(between)
    assert top[:depth] == list(range(depth))
    assert top[-1] == depth - 1
    for layers in (stack, between, top, interpolated(depth * period, wanted * period, period)):
        assert set(layers) == set(range(max(layers) + 1))
        assert sum(first_copies(layers)) == len(set(layers))
    assert [i % period for i in interpolated(depth * period, wanted * period, period)] == [
        i % period for i in range(wanted * period)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["identity", "frozen-substrate"])
def test_layers_that_write_nothing_change_nothing(name: str, kind: str) -> None:
    config, model = source_of(kind)
    target = replace(
        config, n_layers=6, tied_embeddings=name == "identity" and config.tied_embeddings
    )
    options = {} if name == "identity" else {"begin": "zero"}
    growth = operator(name, **options).growth(config, target)
    assert growth.exact
    assert apart(growth, model) < 1e-6
    # And they learn: a gradient reaches what they write.
    new = larger(growth, model)
    new(language(97, 2, 9, 0)).square().sum().backward()
    writes = [
        p.grad.abs().sum()
        for n, p in new.named_parameters()
        if n.endswith("weight") and p.grad is not None and not p.any()
    ]
    assert writes
    assert all(size > 0 for size in writes)


@pytest.mark.parametrize(
    ("name", "layers"), [("stack", [0, 1, 0, 1]), ("interpolate", [0, 0, 1, 1])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_copies_of_layers_take_weights_and_moments_along(
    name: str, layers: list[int], kind: str
) -> None:
    if kind == "shared-tied" and name == "interpolate":
        layers = [0, 1, 0, 1]  # two layers stay together, one of them with experts
    config, model = source_of(kind)
    growth = operator(name, moments="keep").growth(config, replace(config, n_layers=4))
    old, new = dict(states(model)), all_grown(growth, model)
    for weight in named_weights(growth.target):
        source = weight.name
        if source.startswith("blocks."):
            _, number, rest = source.split(".", 2)
            source = f"blocks.{layers[int(number)]}.{rest}"
        assert growth.local_source(weight.name) == source
        assert growth.new_elements(weight.name) is None
        for key, value in new[weight.name].items():
            assert torch.equal(value, old[source][key]), (weight.name, key)
    dropped = all_grown(operator(name).growth(config, growth.target), model)
    for name_, state in dropped.items():
        if "weight" in state:
            assert torch.equal(state["weight"], new[name_]["weight"])
            assert not state["exp_avg"].any()
            assert not state["exp_avg_sq"].any()
            assert state["step"] == 0


def test_what_is_grown_shares_no_memory_with_what_it_came_from() -> None:
    """Maps that worked in place changed the source (Photooon/Multi-Level-Training-Framework)."""
    config, model = source_of("llama")
    growth = operator("stack", moments="keep").growth(config, replace(config, n_layers=4))
    given_states = states(model)
    kept = {name: {k: v.clone() for k, v in state.items()} for name, state in given_states}
    new = dict(grow(growth, given_states))
    for state in new.values():
        for value in state.values():
            value.add_(1.0)
    for name, state in given_states:
        assert all(torch.equal(value, kept[name][key]) for key, value in state.items())
    first, second = (new[f"blocks.{layer}.attention.q_proj.weight"]["weight"] for layer in (0, 2))
    assert first.data_ptr() != second.data_ptr()


def test_old_layers_keep_their_moments_and_added_ones_begin_anew() -> None:
    config, model = source_of("llama")
    growth = operator("identity").growth(config, replace(config, n_layers=4))
    old, new = dict(states(model)), all_grown(growth, model)
    for layer, (source, is_old) in enumerate([(0, True), (0, False), (1, True), (1, False)]):
        for rest in ("attention.q_proj.weight", "feed_forward.down_proj.weight"):
            state, was = new[f"blocks.{layer}.{rest}"], old[f"blocks.{source}.{rest}"]
            if is_old:
                assert all(torch.equal(state[key], was[key]) for key in was)
            else:
                assert state["step"] == 0
                assert not state["exp_avg"].any()
                assert torch.equal(state["weight"], was["weight"]) == (rest[0] == "a")


def test_frozen_are_the_old_layers_and_the_embedding_and_added_layers_are_drawn() -> None:
    config, model = source_of("llama")
    growth = operator("frozen-substrate", seed=3).growth(config, replace(config, n_layers=3))
    names = {weight.name for weight in named_weights(growth.target)}
    trains = names - growth.frozen
    assert trains == {n for n in names if n.startswith("blocks.2.")} | {
        "norm.weight",
        "head.weight",
    }
    assert growth.frozen < names
    name = "blocks.2.feed_forward.up_proj.weight"
    value = all_grown(growth, model)[name]["weight"]
    assert torch.equal(value, initial_value(name, tuple(value.shape), growth.target, 3))


def test_every_weight_of_the_grown_model_is_in_an_optimizer() -> None:
    """`grow()` of tongxuluo/prts appended blocks after AdamW was built: they never trained. Here a
    growth gives the state of every weight of the new model, by the names of its plain list.
    """
    for name in DEPTH:
        config, model = source_of("llama")
        growth = operator(name).growth(config, replace(config, n_layers=4))
        new = all_grown(growth, model)
        grown_model = loaded(growth.target, weights_of(new.items()))
        before = {n: p.detach().clone() for n, p in grown_model.named_parameters()}
        assert {n for n, state in new.items() if "step" in state} == set(before)
        train(grown_model, adamw(new, grown_model, 0.01), 2)
        still = {n for n, p in grown_model.named_parameters() if torch.equal(p, before[n])}
        assert still == set()


def test_the_first_update_of_each_rule_is_the_one_computed_by_hand() -> None:
    config, model = source_of("llama")
    for rule, was_m, was_v, was_step in (("keep", 1, 1, 7), ("drop", 0, 0, 0)):
        growth = operator("stack", moments=rule).growth(config, replace(config, n_layers=4))
        new, old = all_grown(growth, model), dict(states(model))
        grown_model = loaded(growth.target, weights_of(new.items()))
        optimizer = adamw(new, grown_model, 0.01)
        train(grown_model, optimizer, 1)
        name = "blocks.3.attention.q_proj.weight"
        parameter = dict(grown_model.named_parameters())[name]
        assert parameter.grad is not None
        source = old["blocks.1.attention.q_proj.weight"]
        m = 0.9 * source["exp_avg"] * was_m + 0.1 * parameter.grad
        v = 0.95 * source["exp_avg_sq"] * was_v + 0.05 * parameter.grad**2
        step = was_step + 1
        update = m / (1 - 0.9**step) / ((v / (1 - 0.95**step)).sqrt() + 1e-8)
        torch.testing.assert_close(parameter.data, source["weight"] - 0.01 * update)


def test_the_balance_of_mixtures_grows_with_their_layers() -> None:
    config, model = source_of("experts")
    growth = operator("stack").growth(config, replace(config, n_layers=4))
    balance = [
        (f"{kind}.blocks.{layer}", {"value": torch.full((4,), float(layer))})
        for layer in range(2)
        for kind in ("frequencies", "bias")
    ]
    new = dict(grow(growth, [*states(model), *balance]))
    assert set(new) == set(growth.names())
    assert [float(new[f"bias.blocks.{layer}"]["value"][0]) for layer in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "most"),
    [("stack", 2), ("interpolate", 2), ("hypercloning+identity", 2), ("bert2bert-aki", 13)],
)
def test_growth_streams_and_holds_one_old_weight_at_a_time(name: str, most: int) -> None:
    """What is made of one weight is made when it comes; the next layer's rows wait for a layer."""
    config, model = source_of("qwen2", n_layers=3)
    target = replace(config, d_model=64, head_dim=8, n_layers=6 if "bert" not in name else 3)
    if name in ("stack", "interpolate"):
        target = replace(config, n_layers=6)
    growth = operator(name).growth(config, target)
    came: list[weakref.ref[Tensor]] = []
    names: list[str] = []

    def told() -> Iterator[tuple[str, WeightState]]:
        left = states(model)
        while left:
            old, state = left.pop(0)
            names.append(old)
            came.append(weakref.ref(state["weight"]))
            yield old, state

    for new, _ in grow(growth, told()):
        assert "aki" in name or growth.sources(new) in ((), tuple(names[-1:]))
        # One in use, and one that the caller still has in its hand.
        assert sum(ref() is not None for ref in came) <= most
    with pytest.raises(ValueError, match=r"lacks norm\.weight"):
        list(grow(growth, [item for item in states(model) if item[0] != "norm.weight"]))


REFUSED: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("stack", {}, {"n_layers": 2}, "both configs are the same"),
    ("stack", {}, {"n_layers": 1}, "1 is not more than the 2 there are; take 3 or more"),
    ("stack", {}, {"n_layers": 4, "d_model": 64}, "d_model: 32 cannot become 64"),
    ("stack", {}, {"n_layers": 4, "vocabulary_size": 98}, "vocabulary_size"),
    ("stack", {}, {"n_layers": 4, "qk_norm": "head"}, "qk_norm: 'none' cannot become 'head'"),
    ("identity", {}, {"n_layers": 4, "tied_embeddings": True}, "cannot be one; leave it false"),
    ("frozen-substrate", {"tied_embeddings": True}, {"n_layers": 4}, "set it to false"),
    (
        "stack",
        MOE | {"n_layers": 3, "n_dense_layers": 1},
        {"n_layers": 6},
        "layer 3 has experts, and layer 0, which it would stand for, has none; no n_dense_layers",
    ),
    (
        "interpolate",
        MOE | {"n_dense_layers": 1},
        {"n_layers": 4},
        "set n_dense_layers=2 and moe_every=1",
    ),
    (
        "stack",
        {"layer_ffn": (16, 32)},
        {"n_layers": 4, "layer_ffn": (16, 16, 32, 32)},
        "set layer_ffn=[16, 32, 16, 32]",
    ),
]


@pytest.mark.parametrize(("name", "old", "new", "told"), REFUSED)
def test_pairs_that_cannot_be_are_refused_with_what_would_work(
    name: str, old: dict[str, Any], new: dict[str, Any], told: str
) -> None:
    assert told in refusal(name, old, new)


def test_names_and_options_that_are_not_there_are_told_with_the_nearest() -> None:
    for name, options, told in (
        ("stak", {}, "did you mean 'stack'?"),
        ("stack", {"moment": "keep"}, "did you mean 'moments'?"),
        ("stack+identity+stack", {}, "is no pair"),
    ):
        with pytest.raises(ModelError, match="operator") as caught:
            operator(name, **options)
        assert told in str(caught.value)
    config, _ = source_of("llama")
    with pytest.raises(ModelError, match="is not one of keep, tile, drop, asymmetric"):
        operator("stack", moments="halve").growth(config, replace(config, n_layers=4))
