"""The reverse questions: the shortest time and the largest model that a budget allows; and what a
run costs. Pure; no torch.

Fewer machines take longer and cost less, as transfers and bubbles take a smaller share there;
larger models cost more. Both questions are bisections over that, on sets of machines and on sizes,
and each step is a search (`planner.plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from motet.models.config import PRESETS, ModelConfig, preset
from motet.models.counts import parameters_non_embedding, training_flops_per_token
from motet.parallel.cluster.description import Cluster
from motet.parallel.planner.best_first import plan
from motet.parallel.planner.question import PlanQuestion, RankedLayout

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal by arXiv:2203.15556, table 3."""
LAST_STEPS = 3
"""Halvings between two numbers of nodes of which one is within the budget and its double is not."""
GROWTH = 1.1
"""Sets of machines that differ by less than this factor in devices are not told apart."""
Tell = Callable[[str], None]


@dataclass(frozen=True)
class Bill:
    """What a whole run takes: price in the cluster file's currency, None where a device's price (or
    power) is not known.
    """

    days: float
    device_hours: float
    price: float | None
    energy_kwh: float | None


def bill(choice: RankedLayout, tokens: float) -> Bill:
    """Return what training on some tokens takes with a layout."""
    hours = tokens / choice.prediction.tokens_per_s / 3600
    groups = choice.cluster.groups
    devices = choice.cluster.devices
    priced = all(group.device.price_per_hour for group in groups)
    powered = all(group.device.power_w for group in groups)
    price = hours * choice.cluster.price_per_hour if priced else None
    watts = sum(group.devices * group.device.power_w for group in groups)
    return Bill(hours / 24, hours * devices, price, hours * watts / 1000 if powered else None)


@dataclass(frozen=True)
class Budget:
    """Limits; None = none."""

    device_hours: float | None = None
    price: float | None = None
    days: float | None = None

    def over(self, cost: Bill) -> list[str]:
        """Return the limits that a bill breaks, by name; a price that is not known breaks its
        limit.
        """
        pairs = {
            "device-hours": (self.device_hours, cost.device_hours),
            "price": (self.price, cost.price),
            "days": (self.days, cost.days),
        }
        return [
            n for n, (most, have) in pairs.items() if most is not None and not _most(have, most)
        ]

    def holds(self, cost: Bill) -> bool:
        """Return whether a bill stays within all limits."""
        return not self.over(cost)


def _most(have: float | None, most: float) -> bool:
    return have is not None and have <= most


def amount(cost: Bill, limit: str) -> str:
    """Return what a bill says of a limit, with its unit."""
    if limit == "price":
        return "no known price" if cost.price is None else f"a price of {cost.price:,.4g}"
    value = cost.days if limit == "days" else cost.device_hours
    return f"{value:,.4g} {limit}"


@dataclass(frozen=True)
class Affordable:
    """A model with its fastest layout within a budget, and its bill.

    Attributes:
        binds: what keeps it from being faster, or larger; "" where nothing does.
    """

    name: str
    model: ModelConfig
    tokens: float
    choice: RankedLayout
    cost: Bill
    binds: str = ""


@dataclass(frozen=True)
class Refused:
    """Nothing stays within the budget.

    Attributes:
        nearest: the cheapest layout that was found; None where the model fits nowhere.
        over: the limits that its bill breaks.
    """

    nearest: RankedLayout | None
    cost: Bill | None
    over: tuple[str, ...]

    def __str__(self) -> str:
        if self.cost is None:
            return "it fits on none of these machines"
        shown = " and ".join(amount(self.cost, limit) for limit in self.over)
        return f"the cheapest that was found takes {shown}"


def models(vocabulary_size: int) -> Iterator[tuple[str, ModelConfig]]:
    """Yield presets and, beyond the largest, models of the same proportions (128 channels per layer
    and head), largest first.
    """
    scaled = []
    for width in (16_384, 14_336, 12_288, 10_240, 8192, 7168, 6144, 5120):
        heads, layers = width // 128, -(-width // 128)
        ffn = -(-width * 7 // 2 // 1024) * 1024
        model = ModelConfig(vocabulary_size, width, layers, heads, 8, ffn, rope_theta=500_000.0)
        scaled.append((f"{parameters_non_embedding(model) / 1e9:.0f}b", model))
    yield from scaled
    known = [(name, preset(name, vocabulary_size)) for name in PRESETS]
    yield from sorted(known, key=lambda item: -parameters_non_embedding(item[1]))


def fastest(
    question: PlanQuestion,
    budget: Budget,
    tokens: float,
    name: str = "",
    tell: Tell = lambda text: None,
    enough: bool = False,
) -> Affordable | Refused:
    """Return the fastest way to train the question's model within a budget, on any of the machines.

    Args:
        name: of the model.
        tell: hears what is tried.
        enough: any way within the budget will do; its time is not the shortest.
    """
    asked = replace(question, top=1, worth=1.0)
    best: Affordable | None = None
    nearest: Refused | None = None
    for family in _families(question.cluster, budget, question.training.dtype):
        if best is not None and (
            enough
            or _least(replace(asked, cluster=family[-1]), asked.model, tokens).days
            >= best.cost.days
        ):
            continue
        found = _Bisection(asked, budget, tokens, name, tell, enough).over(family)
        if isinstance(found, Refused):
            nearest = _nearer(nearest, found)
        elif best is None or found.cost.days < best.cost.days:
            best = found
    return best or nearest or Refused(None, None, ())


def _nearer(one: Refused | None, other: Refused) -> Refused:
    """Return the one that breaks fewer limits, or else breaks them by less."""
    found = [
        refused for refused in (one, other) if refused is not None and refused.cost is not None
    ]
    return min(found, key=_excess) if found else other


def _excess(refused: Refused) -> tuple[int, float]:
    assert refused.cost is not None, "looked at before"
    only_days = refused.over == ("days",)
    return len(refused.over), refused.cost.days if only_days else refused.cost.device_hours


class _Bisection:
    """Looks for the largest set of machines, in one order, on which the fastest layout is within a
    budget.
    """

    def __init__(
        self,
        question: PlanQuestion,
        budget: Budget,
        tokens: float,
        name: str,
        tell: Tell,
        enough: bool,
    ) -> None:
        self.question, self.budget, self.tokens = question, budget, tokens
        self.name, self.tell, self.enough = name, tell, enough
        self.best: Affordable | None = None
        self.refused = Refused(None, None, ())
        self.binds = ""
        self.used = question.cluster

    def over(self, family: list[Cluster]) -> Affordable | Refused:
        """Return the fastest within the budget; `family` has sets of machines, smallest first."""
        low, high = 0, len(family) - 1
        middle = (low + high) // 2 if self.enough else high  # all machines may well do
        while low <= high and not (self.enough and self.best):
            if self.too_dear(family[middle]):
                # Sets that hold what was too dear have it as their fastest, or what is faster and,
                # as a rule, dearer.
                smaller = [i for i in range(low, middle) if not _holds(family[i], self.used)]
                high = max(smaller, default=low - 1)
            else:
                low = middle + 1
            middle = (low + high) // 2
        if self.best is not None and 0 <= high < len(family) - 1 and not self.enough:
            self._between(family[high], family[high + 1])
        return replace(self.best, binds=self.binds) if self.best else self.refused

    def _between(self, fits: Cluster, dear: Cluster) -> None:
        """Try numbers of nodes between two sets that differ in one group."""
        for _ in range(LAST_STEPS):
            half = _halfway(fits, dear)
            if half is None:
                return
            if self.too_dear(half):
                dear = half
            else:
                fits = half

    def too_dear(self, cluster: Cluster) -> bool:
        """Search these machines, keep what is within the budget, and return whether fewer of them
        should be tried next.
        """
        shown = " + ".join(f"{group.devices:,} {group.name}" for group in cluster.groups)
        self.tell(f"{self.name} on {shown}".strip())
        found = plan(replace(self.question, cluster=cluster))
        if not found.choices:
            return False
        choice, cost = found.best, bill(found.best, self.tokens)
        over = self.budget.over(cost)
        if not over:
            if self.best is None or cost.days < self.best.cost.days:
                self.best = Affordable(self.name, self.question.model, self.tokens, choice, cost)
            return False
        self.refused = _nearer(self.refused, Refused(choice, cost, tuple(over)))
        dear = [limit for limit in over if limit != "days"]
        if dear:  # fewer are tried from here on: the last one is the smallest
            self.used = choice.cluster
            self.binds = f"{shown} would take {amount(cost, dear[0])}"
        return bool(dear)


def _families(cluster: Cluster, budget: Budget, dtype: str) -> list[list[Cluster]]:
    """Return orders in which machines are added, each a list of sets that grow: the cheapest work
    first, then each other group alone.
    """

    def cost(g: int) -> float:
        one = cluster.groups[g].device
        priced = budget.price is not None and one.price_per_hour > 0
        return (one.price_per_hour if priced else 1.0) / one.peak(dtype)

    order = sorted(range(len(cluster.groups)), key=cost)
    joint: list[Cluster] = []
    for at, g in enumerate(order):
        joint += [
            _part(cluster, order[:at], g, *size) for size in _sizes(cluster, g, whole=at == 0)
        ]
    alone = [[_part(cluster, [], g, *size) for size in _sizes(cluster, g)] for g in order[1:]]
    return [_apart(joint), *alone]


def _apart(sets: list[Cluster]) -> list[Cluster]:
    """Leave out sets that are hardly larger than the one before; the largest, and single nodes,
    stay.
    """
    kept: list[Cluster] = []
    for at, one in enumerate(sets):
        # On one node every size is worth a look: a laptop's question has few others.
        few = one.devices <= one.groups[0].devices_per_node
        if few or at == len(sets) - 1 or one.devices >= GROWTH * kept[-1].devices:
            kept.append(one)
    return kept


def _sizes(cluster: Cluster, g: int, whole: bool = True) -> list[tuple[int, int]]:
    """Return (nodes, devices of each), doubled from one device (`whole`) or one node to all of a
    group.
    """
    group = cluster.groups[g]
    found, number = [], 1
    while whole and number < group.devices_per_node:
        found.append((1, number))
        number *= 2
    nodes = 1
    while nodes < group.nodes:
        found.append((nodes, group.devices_per_node))
        nodes *= 2
    return [*found, (group.nodes, group.devices_per_node)]


def _part(cluster: Cluster, full: list[int], g: int, nodes: int, each: int) -> Cluster:
    """Return some groups in full and a part of another, in the cluster's order."""
    kept = {h: cluster.groups[h] for h in full}
    kept[g] = replace(cluster.groups[g], nodes=nodes, devices_per_node=each)
    groups = tuple(kept[h] for h in sorted(kept))
    names = {group.name for group in groups}
    links = {pair: link for pair, link in cluster.links.items() if names.issuperset(pair)}
    return Cluster(groups, links, cluster.currency)


def _holds(cluster: Cluster, used: Cluster) -> bool:
    """Return whether a set of machines has all of another."""
    there = {group.name: group.devices for group in cluster.groups}
    return all(there.get(group.name, 0) >= group.devices for group in used.groups)


def _halfway(fits: Cluster, dear: Cluster) -> Cluster | None:
    """Return the set in the middle of two that differ in the nodes of a group; None where there is
    none worth a look.
    """
    if len(fits.groups) != len(dear.groups) or dear.devices < GROWTH * fits.devices:
        return None
    pairs = list(zip(fits.groups, dear.groups, strict=True))
    middle = tuple(replace(b, nodes=(a.nodes + b.nodes) // 2) for a, b in pairs)
    if all(m.nodes == a.nodes for m, (a, _) in zip(middle, pairs, strict=True)):
        return None
    return replace(dear, groups=middle)


def largest(
    question: PlanQuestion, budget: Budget, tokens: float | None, tell: Tell = lambda text: None
) -> Affordable | Refused:
    """Return the largest model that a budget trains, in the shortest time that it allows.

    Args:
        tokens: of the run; None: `TOKENS_PER_PARAMETER` for each parameter outside the tables.
        tell: hears what is tried.
    """
    sizes = [
        (name, model, tokens or TOKENS_PER_PARAMETER * parameters_non_embedding(model))
        for name, model in models(question.model.vocabulary_size)
    ]
    sizes = [one for one in reversed(sizes) if budget.holds(_least(question, one[1], one[2]))]
    low, high = 0, len(sizes) - 1
    beyond = ""
    refused: Affordable | Refused = Refused(None, None, ())
    while low <= high:
        middle = (low + high) // 2
        name, model, wanted = sizes[middle]
        asked = replace(question, model=model)
        found = fastest(asked, budget, wanted, name, tell, enough=True)
        if isinstance(found, Affordable):
            low = middle + 1
        else:
            high, refused, beyond = middle - 1, found, f"{name}: {found}"
    if high < 0:
        return refused
    name, model, wanted = sizes[high]
    best = fastest(replace(question, model=model), budget, wanted, name, tell)
    return replace(best, binds=beyond) if isinstance(best, Affordable) else best


def _least(question: PlanQuestion, model: ModelConfig, tokens: float) -> Bill:
    """Return less than any run can take: all devices at their peak, the cheapest operations
    everywhere.
    """
    training = question.training
    flops = tokens * training_flops_per_token(model, training.sequence_length)
    groups = question.cluster.groups
    rates = [group.device.peak(training.dtype) * 1e12 * 3600 for group in groups]
    hours = flops / sum(rate * group.devices for rate, group in zip(rates, groups, strict=True))
    prices = [g.device.price_per_hour / rate for g, rate in zip(groups, rates, strict=True)]
    known = [price for price in prices if price]
    price = flops * min(known) if known else None
    return Bill(hours / 24, flops / max(rates), price, None)
