"""What a budget allows: the shortest time, the largest model, and what keeps both from being
better.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest

from motet.models.config import preset
from motet.parallel.cluster.description import Cluster, Group, Link, device, homogeneous
from motet.parallel.cost.terms import Training
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.budget import Affordable, Budget, Refused, bill, fastest, largest
from motet.parallel.planner.question import PlanQuestion

MODEL = preset("1b", 32_768)
TOKENS = 1e9


def halls(nodes: int = 2) -> Cluster:
    inside = Link(300.0, 3.0, "nvlink")
    fast = Group("fast", device("h100"), nodes, 2, inside, Link(3.0, 5.0, "ethernet"))
    slow = Group("slow", device("a100-40"), nodes, 2, inside, Link(3.0, 7.0, "ethernet"))
    return Cluster((fast, slow), {("fast", "slow"): Link(1.0, 50.0, "ethernet")})


def question(cluster: Cluster) -> PlanQuestion:
    return PlanQuestion(MODEL, cluster, Training(16, 2048))


def parts(cluster: Cluster) -> list[Cluster]:
    """Every set of whole nodes, and single devices of one node."""
    found = []
    for numbers in product(*(range(group.nodes + 1) for group in cluster.groups)):
        pairs = [(g, n) for g, n in zip(cluster.groups, numbers, strict=True) if n]
        groups = tuple(replace(group, nodes=number) for group, number in pairs)
        links = cluster.links if len(groups) > 1 else {}
        found += [Cluster(groups, links)] if groups else []
    found += [Cluster((replace(g, nodes=1, devices_per_node=1),)) for g in cluster.groups]
    return found


@pytest.mark.parametrize("hours", [7.0, 20.0])
def test_the_shortest_time_is_that_of_all_parts_of_the_cluster(hours: float) -> None:
    asked = question(halls())
    every = [plan(replace(asked, cluster=part, top=1, worth=1.0)) for part in parts(asked.cluster)]
    bills = [bill(answer.best, TOKENS) for answer in every if answer.choices]
    best = min(cost.days for cost in bills if cost.device_hours <= hours)
    found = fastest(asked, Budget(device_hours=hours), TOKENS)
    assert isinstance(found, Affordable)
    assert found.cost.device_hours <= hours
    assert found.cost.days == pytest.approx(best, rel=0.02)


def test_a_smaller_budget_takes_fewer_machines_and_longer_and_says_what_binds() -> None:
    asked = question(homogeneous("h100", 4, nic_gbit_s=25, network="ethernet"))
    free = fastest(asked, Budget(device_hours=1e6), TOKENS)
    assert isinstance(free, Affordable)
    assert free.binds == ""
    tight = fastest(asked, Budget(device_hours=0.8 * free.cost.device_hours), TOKENS)
    assert isinstance(tight, Affordable)
    assert tight.cost.device_hours <= 0.8 * free.cost.device_hours
    assert tight.cost.days > free.cost.days
    assert tight.choice.cluster.devices < free.choice.cluster.devices
    assert "device-hours" in tight.binds


def test_a_price_takes_the_cheapest_work_first() -> None:
    cheap = replace(device("a100-40"), kind="cheap", price_per_hour=0.1)
    cluster = halls()
    groups = (cluster.groups[0], replace(cluster.groups[1], device=cheap))
    asked = question(replace(cluster, groups=groups))
    every = plan(replace(asked, top=1, worth=1.0)).best
    price = bill(every, TOKENS).price
    assert price is not None
    found = fastest(asked, Budget(price=price / 10), TOKENS)
    assert isinstance(found, Affordable)
    assert [group.name for group in found.choice.cluster.groups] == ["slow"]


def test_what_no_machines_train_within_the_budget_is_refused_with_the_least_that_it_takes() -> None:
    asked = question(halls(1))
    found = fastest(asked, Budget(device_hours=0.1), TOKENS)
    assert isinstance(found, Refused)
    assert found.over == ("device-hours",)
    assert found.cost is not None
    assert f"{found.cost.device_hours:,.4g} device-hours" in str(found)
    late = fastest(asked, Budget(device_hours=1e6, days=1e-4), TOKENS)
    assert isinstance(late, Refused)
    assert late.over == ("days",)
    huge = replace(question(homogeneous("t4", 1, 1)), model=preset("7b", 32_768))
    assert "fits on none" in str(fastest(huge, Budget(device_hours=1e9), TOKENS))


def test_a_larger_budget_trains_a_larger_model_and_a_bill_adds_up() -> None:
    asked = question(homogeneous("h100", 1))
    small = largest(asked, Budget(device_hours=5.0), None)
    large = largest(asked, Budget(device_hours=200.0), None)
    assert isinstance(small, Affordable)
    assert isinstance(large, Affordable)
    assert small.cost.device_hours <= 5.0 < large.cost.device_hours <= 200.0
    assert large.tokens > small.tokens
    assert "device-hours" in small.binds
    choice = plan(asked).best
    cost = bill(choice, choice.prediction.tokens_per_s * 3600)
    assert cost.device_hours == pytest.approx(choice.cluster.devices)
    assert cost.price == pytest.approx(choice.cluster.price_per_hour)
    assert isinstance(largest(asked, Budget(price=1e-9), None), Refused)


def test_an_unknown_price_is_no_price_within_a_budget() -> None:
    free = replace(device("h100"), price_per_hour=0.0)
    cluster = homogeneous("h100", 1)
    asked = question(replace(cluster, groups=(replace(cluster.groups[0], device=free),)))
    found = fastest(asked, Budget(price=100.0), TOKENS)
    assert isinstance(found, Refused)
    assert "no known price" in str(found)
