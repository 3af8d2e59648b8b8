"""Weights and optimizer state go from an engine of one layout to another's, and training goes
on.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from motet.models.config import ModelConfig
from motet.models.growth.growth import grow
from motet.models.growth.registry import operator
from motet.parallel.engines.protocol import EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, Curve, assert_same, one_step

OPTIONS = EngineOptions(z_loss=1e-3, zero_stage=2)
EXPERTS = replace(DENSE, n_experts=4, experts_per_token=2, d_expert=16, bias_rate=1e-3)


def move(
    world: World,
    first: Layout,
    second: Layout,
    config: ModelConfig,
    options: EngineOptions,
    larger: ModelConfig | None = None,
) -> Curve:
    """Train 2 steps under one layout, hand the state over, train 2 more under another, as a larger
    model where one is given.
    """
    before = build_engine(config, options, first, world)
    curve = Curve()

    def steps(engine: Any, layout: Layout, numbers: range) -> None:
        for step in numbers:
            result = one_step(engine, layout, world.rank, step)
            curve.steps.append((result.loss, result.grad_norm, result.n_labels))

    steps(before, first, range(2))
    after = build_engine(larger or config, replace(options, seed=9), second, world)
    names = []

    def followed() -> Any:
        for name, parts in before.export_state():
            names.append(name)
            assert len({value.shape for key, value in parts.items() if key != "step"}) == 1
            assert all(value.device.type == "cpu" for value in parts.values())
            yield name, parts

    state = followed()
    if larger is not None:
        name = "bert2bert-aki+stack" if config.n_experts else "hypercloning+identity"
        options_ = {} if config.n_experts else {"noise": 0.2}
        state = grow(operator(name, **options_).growth(config, larger), state)
    after.import_state(state)
    assert len(names) == len(set(names))
    steps(after, second, range(2, 4))
    curve.weights = {name: value.numpy() for name, value in after.full_model().items()}
    return curve


def both(
    world: World,
    pairs: list[tuple[Layout, Layout]],
    config: ModelConfig,
    options: EngineOptions = OPTIONS,
    larger: ModelConfig | None = None,
) -> list[Curve]:
    return [move(world, first, second, config, options, larger) for first, second in pairs]


ONE = Layout(micro_sequences=2)
FSDP = Layout(dp_shard=2, micro_sequences=2)
REPLICAS = Layout(dp_replicate=2, micro_sequences=2)
TP = Layout(tp=2, micro_sequences=2)
PP = Layout(pp=2, micro_sequences=2)
CP = Layout(cp=2, micro_sequences=2)


def test_state_moves_between_layouts_and_training_goes_on_as_if_alone() -> None:
    expected = run_ranks(1, both, [(ONE, ONE)], DENSE)[0][0]
    pairs = [(FSDP, PP), (PP, TP), (TP, CP), (CP, REPLICAS), (REPLICAS, FSDP)]
    for found in run_ranks(2, both, pairs, DENSE)[0]:
        assert_same(found, expected)


def test_state_of_experts_moves_with_the_counts_of_their_balance() -> None:
    expected = run_ranks(1, both, [(ONE, ONE)], EXPERTS)[0][0]
    spread = Layout(dp_shard=2, ep=2, micro_sequences=2)
    for found in run_ranks(2, both, [(spread, FSDP), (PP, spread)], EXPERTS)[0]:
        assert_same(found, expected)


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_a_model_grows_between_two_layouts_as_in_one_process(config: ModelConfig) -> None:
    """Wider and deeper, under another layout: the same weights, optimizer state and losses."""
    widths = {"d_expert": 24} if config.n_experts else {"d_ffn": 2 * config.d_ffn}
    larger = replace(
        config,
        n_layers=2 * config.n_layers,
        d_model=2 * config.d_model,
        n_heads=2 * config.n_heads,
        n_kv_heads=2 * config.n_kv_heads,
        **widths,
    )
    expected = run_ranks(1, both, [(ONE, ONE)], config, OPTIONS, larger)[0][0]
    pairs = [(FSDP, PP), (PP, Layout(dp_shard=2, ep=2, micro_sequences=2))]
    if not config.n_experts:
        pairs[1] = (PP, TP)
    for found in run_ranks(2, both, pairs, config, OPTIONS, larger)[0]:
        assert_same(found, expected)


@pytest.mark.long
def test_a_model_grows_on_four_ranks_as_in_one_process() -> None:
    """Sharded over all, and over two with tensor parallelism inside; either way round."""
    larger = replace(twice_as_wide(DENSE), n_layers=2 * DENSE.n_layers)
    expected = run_ranks(1, both, [(ONE, ONE)], DENSE, OPTIONS, larger)[0][0]
    four, mixed = (
        Layout(dp_shard=4, micro_sequences=1),
        Layout(tp=2, dp_shard=2, micro_sequences=2),
    )
    for found in run_ranks(4, both, [(four, mixed), (mixed, four)], DENSE, OPTIONS, larger)[0]:
        assert_same(found, expected)


def twice_as_wide(config: ModelConfig) -> ModelConfig:
    heads = {"n_heads": 2 * config.n_heads, "n_kv_heads": 2 * config.n_kv_heads}
    return replace(config, d_model=2 * config.d_model, d_ffn=2 * config.d_ffn, **heads)


def warmed(world: World, layouts: list[Layout], shares: tuple[float, ...]) -> list[Curve]:
    """Train a model that grew by SPARKLING, new values at shares of the learning rate."""
    larger, found = twice_as_wide(DENSE), []
    growth = operator("sparkling").growth(DENSE, larger)
    for layout in layouts:
        before = build_engine(DENSE, OPTIONS, layout, world)
        for step in range(2):
            one_step(before, layout, world.rank, step)
        engine = build_engine(larger, OPTIONS, layout, world)
        engine.import_state(grow(growth, before.export_state()))
        curve = Curve()
        for step, share in enumerate(shares):
            engine.rewarm(share, growth.new_elements)
            result = one_step(engine, layout, world.rank, 2 + step)
            curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
        found.append(curve)
    return found


def test_new_values_alone_move_by_their_share_of_a_step() -> None:
    """AdamW moves a value in proportion to its learning rate, so a share is read off one step."""
    growth = operator("sparkling").growth(DENSE, twice_as_wide(DENSE))
    begin, full, part = (run_ranks(1, warmed, [ONE], s)[0][0] for s in ((), (1.0,), (0.25,)))
    seen = 0
    for name, old in begin.weights.items():
        new = growth.new_elements(name)
        moved, less = full.weights[name] - old, part.weights[name] - old
        share = np.ones(old.shape) if new is None else np.where(new.numpy(), 0.25, 1.0)
        np.testing.assert_allclose(less, moved * share, atol=1e-7)
        seen += int((share < 1).sum() and np.abs(moved[share < 1]).max() > 1e-5)
    assert seen > 5


def test_new_values_are_warmed_up_on_two_ranks_as_on_one() -> None:
    shares = (0.4, 0.8, 1.3, 1.0)
    expected = run_ranks(1, warmed, [ONE], shares)[0][0]
    assert expected.weights.keys()
    for found in run_ranks(2, warmed, [FSDP, TP, PP], shares)[0]:
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("engine", "zero_stage"),
    [("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3), ("accelerate", 2)],
)
def test_state_moves_to_another_engine_and_back(engine: str, zero_stage: int) -> None:
    pytest.importorskip(engine)
    options = replace(OPTIONS, zero_stage=zero_stage)
    expected = run_ranks(1, both, [(ONE, ONE)], DENSE)[0][0]
    other = Layout(engine=engine, dp_shard=2, micro_sequences=2)
    for found in run_ranks(2, both, [(FSDP, other), (other, FSDP)], DENSE, options)[0]:
        assert_same(found, expected)


def lacking(world: World) -> str:
    engine = build_engine(DENSE, OPTIONS, ONE, world)
    some = list(engine.export_state())[1:]
    with pytest.raises(ValueError, match=r"embedding\.weight"):
        engine.import_state(some)
    return "refused"


def test_a_state_that_lacks_a_weight_is_refused() -> None:
    assert run_ranks(1, lacking)[0] == "refused"
