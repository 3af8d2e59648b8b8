"""The list of weights and products is the only one: its readers follow when it gains a product."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from motet.models import architecture, counts
from motet.models.architecture import Split, WeightSpec
from motet.models.config import ModelConfig
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.block import BlockCost
from motet.parallel.cost.block_shape import BlockSplit
from motet.parallel.cost.links import strided
from motet.parallel.cost.stages import NATIVE, Constants, stage_costs
from motet.parallel.layout.collectives import ValueBytes, step_collectives
from motet.parallel.layout.layout import Layout
from motet.parallel.layout.weights import weights

DENSE = ModelConfig(96, 32, 4, 4, 4, 48)
GATE = "attention.gate_proj.weight"


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Attention whose output is gated by a product of its input (arXiv:2505.06708): one more line
    of the list.
    """
    plain = architecture._attention

    def attention(config: ModelConfig) -> Iterator[WeightSpec]:
        shape = config.query_width, config.d_model
        yield from plain(config)
        yield WeightSpec(GATE, shape, Split.COLUMNS, ("heads", "stream"), "attention.gate")

    caches = architecture._block_weights, architecture._block_products
    monkeypatch.setattr(architecture, "_attention", attention)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


LAYOUT = Layout(dp_shard=2, tp=2, pp=2, micro_sequences=1)


def priced() -> tuple[BlockCost, BlockSplit]:
    """The cost of blocks on an H100, and 64 tokens of one on two tensor-parallel ranks."""
    group = homogeneous("h100", 8).groups[0]
    one, two = strided(group, 1, 1), strided(group, 2, 1)
    cost = BlockCost(DENSE, group.device, "bf16", NATIVE, Constants())
    return cost, BlockSplit(64, 64, two, one, one, one, True, False)


def figures() -> dict[str, float]:
    """What the readers of the list say of one model under one layout."""
    cost, split = priced()
    whole, stages = weights(DENSE, LAYOUT), stage_costs(LAYOUT, DENSE, 64)
    moved = step_collectives(DENSE, LAYOUT, 64, 2, sizes=ValueBytes(2, 2, 4))
    return {
        "parameters": counts.parameters(DENSE),
        "matmul": counts.matmul_parameters(DENSE),
        "flops": counts.training_flops_per_token(DENSE, 64),
        "held": sum(weight.numel for weight in whole),
        "stage": stages[0].parameters,
        "stage held": stages[0].held_parameters,
        "stage flops": stages[0].forward_flops,
        "gathered": sum(
            t.total_bytes for t in moved if (t.group, t.kind) == ("fsdp", "all_gather")
        ),
        "reduced": sum(
            t.total_bytes for t in moved if (t.group, t.kind) == ("fsdp", "reduce_scatter")
        ),
        "product seconds": cost.products_s(split, cost.shapes[False]),
    }


def test_a_product_that_the_list_gains_is_counted_held_moved_and_priced(
    request: pytest.FixtureRequest,
) -> None:
    before = figures()
    request.getfixturevalue("gated")
    after = figures()
    one = DENSE.query_width * DENSE.d_model
    grown = {name: after[name] - before[name] for name in before}
    layers = len(LAYOUT.layers_of_stages(DENSE)[0])
    each_s = priced()[0].product_s(64, DENSE.d_model, DENSE.query_width / 2)
    assert grown.pop("product seconds") == pytest.approx(each_s)
    assert grown == {
        "parameters": DENSE.n_layers * one,
        "matmul": DENSE.n_layers * one,
        "flops": 6 * DENSE.n_layers * one,
        "held": layers * one / 2,
        "stage": layers * one,
        "stage held": layers * one / 4,
        "stage flops": 2 * layers * one,
        "gathered": 2 * layers * one / 2,
        "reduced": 4 * layers * one / 2,
    }
