from __future__ import annotations

from dataclasses import replace

import pytest

from motet.models.config import preset
from motet.parallel.cluster.constants import Constants
from motet.parallel.cluster.description import homogeneous
from motet.parallel.cost.context import KEY_SUM_BYTES, MERGE_BYTES, QUERY_SUM_BYTES, ring
from motet.parallel.cost.links import strided
from motet.parallel.cost.stages import NATIVE, Training, predict
from motet.parallel.layout.layout import Layout
from motet.parallel.runtime.context_pieces import ring_bytes

H100 = homogeneous("h100", 8, nic_gbit_s=400.0)
MODEL = preset("7b", 128_256)
TOKENS, QUERIES, KEYS, BANDWIDTH = 4096, 1024.0, 512.0, 1e12


def costs(cp: int, core_s: tuple[float, float] = (1.0, 2.5), stride: int = 8, **traits: bool):
    group = strided(H100.groups[0], cp, stride)
    backend = replace(NATIVE, **traits)
    return group, ring(group, TOKENS, (QUERIES, KEYS), 2.0, core_s, BANDWIDTH, backend, Constants())


def test_one_rank_goes_around_nothing() -> None:
    assert costs(1)[1] == (0.0, 0.0, 0.0)


def test_behind_long_scores_only_sums_and_the_last_gradients_take_time() -> None:
    group, found = costs(4)
    merge_s = TOKENS * QUERIES * (MERGE_BYTES + 2) / BANDWIDTH
    sum_s = TOKENS * (QUERIES * (QUERY_SUM_BYTES + 2) + KEYS * (KEY_SUM_BYTES + 2)) / BANDWIDTH
    assert found.forward_s == pytest.approx(3 * merge_s)
    last_s = group.send_s(TOKENS * KEYS * 4.0, Constants())
    assert found.backward_s == pytest.approx(3 * sum_s + last_s)


def test_with_nothing_to_hide_behind_all_bytes_of_the_ring_take_time() -> None:
    """Its bytes are those that `ring_bytes` counts, which a test holds against real transfers."""
    group, found = costs(4, core_s=(0.0, 0.0))
    moved = ring_bytes(TOKENS, int(KEYS) // 2, 2, 4, segments=False)
    rate = TOKENS * KEYS * 2.0 / (group.send_s(TOKENS * KEYS * 2.0, Constants()) - 15e-6)
    assert found.forward_s >= 0.95 * moved["forward"] / rate
    assert found.backward_s >= 0.95 * moved["backward"] / rate
    assert found.forward_s <= 1.3 * moved["forward"] / rate
    assert found.backward_s <= 1.3 * moved["backward"] / rate


def test_keys_that_are_gathered_hide_behind_one_step_and_need_more_memory() -> None:
    short = (4e-4, 1.0)  # a quarter hides one send, not all three
    around, gathered = costs(4, short)[1], costs(4, short, context_gathers=True)[1]
    assert gathered.forward_s > around.forward_s
    assert gathered.buffer_bytes - around.buffer_bytes == pytest.approx(2 * TOKENS * KEYS * 2)


def test_a_longer_ring_costs_more_of_the_same_tokens_per_rank() -> None:
    shares = []
    for cp in (1, 2, 4, 8):
        training = Training(16, 4096 * cp)
        layout = Layout(dp_shard=16 // cp, cp=cp, recompute="full")
        found = predict(MODEL, homogeneous("h100", 2, nic_gbit_s=400.0), layout, training)
        shares.append(found.parts["context"] / found.step_time_s)
    assert shares[0] == 0.0
    assert shares == sorted(shares)
    assert 0.005 < shares[1] < shares[3] < 0.2
