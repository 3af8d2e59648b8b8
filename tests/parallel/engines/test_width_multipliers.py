"""Learning rates that follow widths (muP): one update by hand, and the same under every layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from motet.models.config import ModelConfig
from motet.models.growth.growth import grow
from motet.models.growth.multiplied import Multiplied
from motet.models.growth.registry import operator
from motet.models.width_multipliers import initial_scales, multiplied
from motet.parallel.engines.protocol import Engine, EngineOptions, build_engine
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.mesh import World
from tests.parallel.ranks import run_ranks
from tests.parallel.training import DENSE, Curve, assert_same, one_step

LR = 1e-3  # of `one_step`
OPTIONS = EngineOptions(base_width=DENSE, z_loss=1e-3)
TIED = replace(DENSE, tied_embeddings=True)
ONE, FSDP = Layout(micro_sequences=2), Layout(dp_shard=2, micro_sequences=2)
TP, PP = Layout(tp=2, micro_sequences=2), Layout(pp=2, micro_sequences=2)
States = dict[str, dict[str, npt.NDArray[np.float64]]]


def wider(config: ModelConfig) -> ModelConfig:
    """Twice as wide, with feed-forwards of three times as many channels."""
    heads: dict[str, Any] = {"n_heads": 8, "n_kv_heads": 4, "head_dim": config.head_width}
    return multiplied(config, replace(config, d_model=64, d_ffn=192, **heads))


def grown_engine(world: World, layout: Layout, base: ModelConfig) -> Engine:
    """Train two steps, and grow."""
    options, target = replace(OPTIONS, base_width=base), wider(base)
    before = build_engine(base, options, layout, world)
    for step in range(2):
        one_step(before, layout, world.rank, step)
    alike = replace(target, output_multiplier=1.0)
    plain = operator("hypercloning", noise=0.2).growth(base, alike)
    growth = Multiplied(plain, target, initial_scales(base, target))
    engine = build_engine(target, replace(options, seed=9), layout, world)
    engine.import_state(grow(growth, before.export_state()))
    return engine


def updated(world: World, base: ModelConfig) -> tuple[States, States]:
    """The states of a model that grew, before and after its first update."""
    engine = grown_engine(world, ONE, base)
    before = states_of(engine)
    one_step(engine, ONE, world.rank, 2)
    return before, states_of(engine)


def states_of(engine: Engine) -> States:
    return {
        name: {key: value.double().numpy() for key, value in state.items()}
        for name, state in engine.export_state()
    }


def test_the_first_update_after_growth_is_what_it_is_by_hand() -> None:
    (found,) = run_ranks(1, updated, DENSE)
    before, after = found
    (beta1, beta2), eps, decay = OPTIONS.betas, OPTIONS.eps, OPTIONS.weight_decay
    rates: dict[str, set[float]] = {}
    for name, old in before.items():
        kind = name.split(".")[-2]
        matrix = name.startswith("blocks.") and kind.endswith("_proj")
        ratio = (3.0 if kind == "down_proj" else 2.0) if matrix else 1.0
        rates.setdefault(kind, set()).add(ratio)
        decays = matrix or name == "head.weight"
        new, step = after[name], int(old["step"]) + 1
        assert step == 3
        mean = new["exp_avg"] / (1 - beta1**step)
        square = new["exp_avg_sq"] / (1 - beta2**step)
        # What decay takes is the same share of a weight at any width.
        kept = old["weight"] * (1 - LR * decay * decays)
        expected = kept - LR / ratio * mean / (np.sqrt(square) + eps)
        np.testing.assert_allclose(new["weight"], expected, atol=1e-7, rtol=1e-6, err_msg=name)
        assert np.abs(new["weight"] - old["weight"]).max() > 1e-5, name
    assert rates["embedding"] == rates["head"] == rates["norm"] == rates["q_norm"] == {1.0}
    assert rates["q_proj"] == rates["o_proj"] == {2.0}


def curves(world: World, layouts: list[Layout], base: ModelConfig) -> list[Curve]:
    """Three steps of a model that grew, under each layout."""
    found = []
    for layout in layouts:
        engine, curve = grown_engine(world, layout, base), Curve()
        for step in range(2, 5):
            result = one_step(engine, layout, world.rank, step)
            curve.steps.append((result.loss, result.grad_norm, result.n_labels))
        curve.weights = {name: value.numpy() for name, value in engine.full_model().items()}
        found.append(curve)
    return found


@pytest.mark.parametrize(
    ("base", "layouts"),
    [
        pytest.param(DENSE, [FSDP, TP, PP], id="head"),
        pytest.param(TIED, [FSDP, TP], id="tied", marks=pytest.mark.long),
    ],
)
def test_ranks_have_the_rates_and_logits_of_one_process(
    base: ModelConfig, layouts: list[Layout]
) -> None:
    expected = run_ranks(1, curves, [ONE], base)[0][0]
    assert expected.weights.keys()
    for found in run_ranks(2, curves, layouts, base)[0]:
        assert_same(found, expected)


@pytest.mark.long
def test_four_ranks_have_the_rates_and_logits_of_one_process() -> None:
    expected = run_ranks(1, curves, [ONE], DENSE)[0][0]
    layouts = [
        Layout(dp_shard=4, micro_sequences=1),
        Layout(tp=2, dp_shard=2, micro_sequences=2),
        Layout(pp=2, tp=2, micro_sequences=2),
        Layout(pp=2, dp_replicate=2, micro_sequences=2),
    ]
    for found in run_ranks(4, curves, layouts, DENSE)[0]:
        assert_same(found, expected)


def test_engines_that_have_one_rate_are_not_given_more() -> None:
    with pytest.raises(AssertionError, match="accelerate gives all weights one learning rate"):
        build_engine(DENSE, OPTIONS, Layout(engine="accelerate"), None)  # type: ignore[arg-type]
