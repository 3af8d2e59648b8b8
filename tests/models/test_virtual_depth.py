"""Apollo's virtual depth: which depths are drawn, how layers are shared, and what that costs."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from motet.models.counts import block_training_flops_per_token, training_flops_per_token
from motet.models.decoder import Decoder, initialize
from motet.models.family.base import choices
from motet.models.family.costs import choice_flops
from motet.models.family.virtual_depth import LEAST, lvps_depth, times, virtual_depth
from motet.models.growth.depth import interpolated
from motet.models.growth.growth import grown
from motet.models.growth.registry import operator
from tests.models.families import tiny
from tests.models.test_progressive import LENGTH, SMALL, STEPS, WHOLE, family, told

DEEP = replace(tiny(), n_layers=6, n_heads=4, n_kv_heads=2)
STAGES: list[dict[str, Any]] = [
    {"name": "two", "depth": "1/3", "steps": 100},
    {"name": "three", "depth": 0.5, "steps": 50},
    {},
]


def test_depths_are_those_of_the_published_curve() -> None:
    """By hand, N = 3 and L = 12: begin 4.4, end .6; at x = .5 the ratio is m / (x + n) with
    n = .15788, m = .69473: 1.056, and 3.17 layers.
    """
    assert lvps_depth(0.5, 3, 12) == 3
    assert lvps_depth(LEAST, 3, 12) == 12
    assert lvps_depth(1.0, 3, 12) == 3
    # x + n = .69473 / 2 at a ratio of 2: x = .18949
    assert [lvps_depth(x, 3, 12) for x in (0.189, 0.190)] == [6, 5]
    for layers, mean in ((3, 4.23), (6, 7.14), (9, 9.67)):
        drawn = [lvps_depth(x, layers, 12) for x in np.linspace(LEAST, 1, 20_001)]
        assert np.mean(drawn) == pytest.approx(mean, abs=0.02)
    counted = Counter(lvps_depth(x, 3, 12) for x in np.linspace(LEAST, 1, 20_001))
    assert counted[3] / 20_001 == pytest.approx(0.64, abs=0.005)
    assert counted[12] / 20_001 == pytest.approx(0.016, abs=0.001)


def test_what_a_step_draws_is_a_function_of_seed_and_step() -> None:
    drawn = [virtual_depth(3, step, 3, 12) for step in range(2000)]
    assert drawn == [virtual_depth(3, step, 3, 12) for step in range(2000)]
    assert drawn != [virtual_depth(4, step, 3, 12) for step in range(2000)]
    assert np.mean(drawn) == pytest.approx(4.23, abs=0.15)


@pytest.mark.parametrize(
    ("layers", "depth", "shared"),
    [
        (3, 3, (1, 1, 1)),
        (3, 5, (2, 2, 1)),
        (3, 12, (4, 4, 4)),
        (2, 3, (2, 1)),
        (4, 7, (2, 2, 2, 1)),
    ],
)
def test_layers_are_shared_as_growth_by_interpolation_would_copy_them(
    layers: int, depth: int, shared: tuple[int, ...]
) -> None:
    assert times(layers, depth) == shared
    assert interpolated(layers, depth) == [
        n for n, count in enumerate(shared) for _ in range(count)
    ]


def test_a_shared_pass_computes_what_the_grown_model_would_and_adds_gradients_up() -> None:
    config = replace(DEEP, n_layers=3)
    model = Decoder(config)
    initialize(model, seed=0)
    deep = replace(config, n_layers=5)
    copies = Decoder(deep)
    growth = operator("interpolate").growth(config, deep)
    copies.load_state_dict(grown(growth, model.state_dict()))
    tokens = torch.arange(12)[None]
    labels = tokens + 1
    shared = model(tokens, labels, mode="loss", times=times(3, 5))
    alone = copies(tokens, labels, mode="loss")
    torch.testing.assert_close(shared.objective, alone.objective)
    shared.objective.backward()
    alone.objective.backward()
    name = next(
        n.replace("blocks.0", "blocks.{}") for n, _ in model.named_parameters() if "up_proj" in n
    )
    gradients = dict(copies.named_parameters())
    mine = dict(model.named_parameters())[name.format(0)].grad
    one, other = (gradients[name.format(layer)].grad for layer in (0, 1))
    assert one is not None
    assert other is not None
    torch.testing.assert_close(mine, one + other)


def test_the_preset_shares_layers_in_all_stages_but_the_last_and_interpolates() -> None:
    found = family(*STAGES, whole=DEEP, preset="apollo")
    assert found.problems(STEPS) == []
    assert [stage.operator for stage in found.stages] == ["", "interpolate", "interpolate"]
    assert [stage.virtual for stage in found.stages] == [True, True, False]
    members = {member.name: member for member in found.members()}
    seen = set()
    for step in range(STEPS):
        chosen = choices(found, members, step, 1)
        if step >= 150:
            assert chosen is None
            continue
        ((term,),) = chosen or ()
        layers = 2 if step < 100 else 3
        depth = virtual_depth(3, step, layers, 6)
        assert layers <= depth <= 6
        assert term.times == (() if depth == layers else times(layers, depth))
        seen.add(depth)
        # What the engine is told is the same, of its own model.
        own = found.term(step)
        assert (own.times if own else ()) == term.times
        assert term.member == found.member_at(step)
    assert {2, 3, 4, 6} <= seen


def test_layers_that_run_again_are_in_the_account_of_operations() -> None:
    found = family(*STAGES, whole=DEEP, preset="apollo")
    members = {member.name: member for member in found.members()}
    config = found.stages[0].config
    once = training_flops_per_token(config, LENGTH)
    block = block_training_flops_per_token(config, LENGTH)
    spent = []
    for step in range(100):
        (choice,) = choices(found, members, step, 1) or ()
        spent.append(choice_flops(choice, DEEP, LENGTH))
        assert spent[-1] == once + (virtual_depth(3, step, 2, 6) - 2) * block
    first, second, last = found.stage_facts()
    assert first["virtual_flops_per_token"] == pytest.approx(sum(spent) / 100)
    assert second["virtual_flops_per_token"] > training_flops_per_token(
        found.stages[1].config, LENGTH
    )
    assert "virtual_flops_per_token" not in last


@pytest.mark.parametrize(
    ("stages", "why"),
    [
        (
            [SMALL, {"operator": "stack", "virtual_depth": "lvps"}],
            "stages[1].virtual_depth: the la",
        ),
        ([{**SMALL, "virtual_depth": "twice"}, {"operator": "stack"}], "'twice' is not"),
        (
            [
                {
                    "name": "small",
                    "depth": 0.5,
                    "virtual_depth": "lvps",
                    "until": {"loss_fall": 0.1, "least_tokens": 20_000, "most_tokens": 40_000},
                },
                {"operator": "stack"},
            ],
            "stages[0].virtual_depth: does not go with until",
        ),
    ],
)
def test_what_cannot_share_layers_is_one_error(stages: list[Any], why: str) -> None:
    assert why in told(*stages)


def test_experts_count_tokens_and_are_refused() -> None:
    mixed = replace(WHOLE, n_experts=4, experts_per_token=2)
    shared = {**SMALL, "virtual_depth": "lvps"}
    assert "counted by its experts" in told(shared, {"operator": "interpolate"}, whole=mixed)
