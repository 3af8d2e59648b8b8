"""The reverse question: the largest model that a budget trains, and what a run costs in time, money and energy. Pure; no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from motet.models.config import PRESETS, ModelConfig, preset
from motet.models.counts import parameters, parameters_non_embedding, training_flops_per_token
from motet.parallel.plan_terms import Choice, Question
from motet.parallel.planner import plan

TOKENS_PER_PARAMETER = 20.0
"""Compute-optimal by arXiv:2203.15556, table 3."""


@dataclass(frozen=True)
class Bill:
    """What a whole run takes: price in the cluster file's currency, None where a device's price (or power) is not known."""

    days: float
    device_hours: float
    price: float | None
    energy_kwh: float | None


def bill(choice: Choice, tokens: float) -> Bill:
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

    def holds(self, cost: Bill) -> bool:
        """Return whether a bill stays within all limits; a price that is not known stays within none."""
        pairs = (
            (self.device_hours, cost.device_hours),
            (self.price, cost.price),
            (self.days, cost.days),
        )
        return all(most is None or (have is not None and have <= most) for most, have in pairs)


@dataclass(frozen=True)
class Affordable:
    """A model with its fastest layout and its bill."""

    name: str
    model: ModelConfig
    tokens: float
    choice: Choice
    cost: Bill


def models(vocabulary_size: int) -> Iterator[tuple[str, ModelConfig]]:
    """Yield presets and, beyond the largest, models of the same proportions (128 channels per layer and head), largest first."""
    scaled = []
    for width in (16_384, 14_336, 12_288, 10_240, 8192, 7168, 6144, 5120):
        heads, layers = width // 128, -(-width // 128)
        ffn = -(-width * 7 // 2 // 1024) * 1024
        model = ModelConfig(vocabulary_size, width, layers, heads, 8, ffn, rope_theta=500_000.0)
        scaled.append((f"{parameters_non_embedding(model) / 1e9:.0f}b", model))
    yield from scaled
    known = [(name, preset(name, vocabulary_size)) for name in PRESETS]
    yield from sorted(known, key=lambda item: -parameters_non_embedding(item[1]))


def largest(question: Question, budget: Budget, tokens: float | None) -> Affordable | None:
    """Return the largest model that a budget trains; None where even the smallest is too dear or fits nowhere.

    Args:
        tokens: of the run; None: `TOKENS_PER_PARAMETER` for each parameter outside the tables.
    """
    for name, model in models(question.model.vocabulary_size):
        wanted = tokens or TOKENS_PER_PARAMETER * parameters_non_embedding(model)
        if not budget.holds(_least(question, model, wanted)):
            continue
        answer = plan(replace(question, model=model, top=1, worth=1.0))
        if answer.choices:
            cost = bill(answer.best, wanted)
            if budget.holds(cost):
                return Affordable(name, model, wanted, answer.best, cost)
    return None


def _least(question: Question, model: ModelConfig, tokens: float) -> Bill:
    """Return less than any run can take: all devices at their peak, the cheapest operations everywhere."""
    training = question.training
    flops = tokens * training_flops_per_token(model, training.sequence_length)
    groups = question.cluster.groups
    rates = [group.device.peak(training.dtype) * 1e12 * 3600 for group in groups]
    hours = flops / sum(rate * group.devices for rate, group in zip(rates, groups, strict=True))
    prices = [g.device.price_per_hour / rate for g, rate in zip(groups, rates, strict=True)]
    price = flops * min(prices) if all(prices) else None
    return Bill(hours / 24, flops / max(rates), price, None)


def size(model: ModelConfig) -> str:
    """Return a number of parameters for people."""
    number = parameters(model)
    return f"{number / 1e9:,.1f} B" if number >= 1e9 else f"{number / 1e6:,.1f} M"
