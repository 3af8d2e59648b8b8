"""What probes cost: which of them an answer needs, how many tokens pass through the model, and,
before any training, their share of its time.

A forward pass is a third of a training step's arithmetic (Kaplan et al., "Scaling Laws for Neural
Language Models", 2020, section 2.1: 2 FLOPs a parameter and token forward, 4 backward), so a token
of a probe is counted as a third of a token of training. That is an estimate: small batches are
slower a token, and a text that ends early costs less than is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from motet.core.format import percent
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.assignment import Question
from motet.experiments.design.study import Study
from motet.experiments.scoring.generation import most_tokens
from motet.experiments.scoring.probes import EncodedItems, encode_items
from motet.launcher.config.sections import RunSettings

FORWARD = 1 / 3
SAMPLE = 32
"""Items whose tokens are counted; of more, every so manyth."""
NAMED = 3
TOLD_ABOVE = 0.05


def needed_steps(
    question: Question, judged: int, totals: Sequence[int], also: Sequence[int] = ()
) -> set[int]:
    """Return the steps at which a question is measured whatever it costs.

    Args:
        question: of the run.
        judged: the frozen step of its judgement.
        totals: lengths of the run, as it was frozen and as it is now.
        also: further steps.
    """
    kind, spec = type(question.experiment), question.experiment.spec
    bare = kind(replace(spec, probe_at={}))
    return {0, judged, *also, *totals}.union(*(bare.probe_steps(total) for total in totals))


def work_of(items: EncodedItems, batch_tokens: int) -> int:
    """Return the tokens that one probe of an experiment passes through the model, at most."""
    return sum(map(len, items.tokens)) + most_tokens(items.prompts, batch_tokens)


@dataclass(frozen=True)
class ProbePrice:
    """The probes of one experiment: tokens that one of them passes through the model, how often it
    is measured, and how often when only what its answer needs is.
    """

    name: str
    tokens: int
    times: int
    needed: int


@dataclass(frozen=True)
class ProbePrices:
    """The probes of a run; `trained` is its tokens of training, `budget` the setting."""

    prices: tuple[ProbePrice, ...]
    trained: int
    budget: float | None

    @property
    def share(self) -> float:
        """Time of probes by time of training."""
        return FORWARD * sum(one.tokens * one.times for one in self.prices) / self.trained

    @property
    def needed_share(self) -> float:
        """The same when nothing but what answers need is measured."""
        return FORWARD * sum(one.tokens * one.needed for one in self.prices) / self.trained

    def to_json(self) -> dict[str, Any]:
        """As `experiments check --json` has it."""
        rows = {
            one.name: {"tokens": one.tokens, "times": one.times, "needed": one.needed}
            for one in self.prices
        }
        return {"share": self.share, "needed_share": self.needed_share, "experiments": rows}

    def __str__(self) -> str:
        tokens = sum(one.tokens for one in self.prices)
        times = max(one.times for one in self.prices)
        said = (
            f"probes: about {tokens:,} tokens a time, at most {times} times: about "
            f"{percent(self.share)} of the time of training"
        )
        if self.budget is not None:
            needed = percent(self.needed_share)
            return f"{said}, held to {percent(self.budget)} or what answers need ({needed})"
        if len(self.prices) > 1:
            dearest = sorted(self.prices, key=lambda one: (-one.tokens * one.times, one.name))
            whole = sum(one.tokens * one.times for one in self.prices)
            named = (
                f"{one.name} {percent(one.tokens * one.times / whole)}" for one in dearest[:NAMED]
            )
            said += f" (of it {', '.join(named)})"
        said += f"; answers alone need {percent(self.needed_share)}"
        return f"{said}; probes.budget bounds the rest" if self.share > TOLD_ABOVE else said


def probe_prices(study: Study, settings: RunSettings) -> ProbePrices | None:
    """Return what the probes of a run will cost; None where nothing is measured, or a family's
    members are: what a step of theirs costs is their recipe's matter.
    """
    if not study.questions or settings.family.kind == "nested":
        return None
    total = study.setting.steps_total
    trained = settings.batch_steps.slots_before(settings.steps) * settings.data.sequence_length
    tokenizer, room = study.setting.tokenizer, settings.probes.batch_tokens
    prices = []
    for question in study.questions:
        judged = question.spec.judged_step(total)
        times = question.experiment.probe_steps(total) | {judged}
        needed = needed_steps(question, judged, [total])
        tokens = _tokens(question, tokenizer, settings.data.sequence_length, room)
        prices.append(ProbePrice(question.name, tokens, len(times), len(needed)))
    return ProbePrices(tuple(prices), trained, settings.probes.budget)


def _tokens(question: Question, tokenizer: Tokenizer, length: int, batch_tokens: int) -> int:
    items = [item for unit in question.units for item in unit.items]
    written = [item for item in items if item.max_tokens]
    scored = [item for item in items if not item.max_tokens]
    step = max(1, len(scored) // SAMPLE)
    where = f"experiments.{question.name}"
    encoded = encode_items(scored[::step], tokenizer, length, where)
    mean = sum(map(len, encoded.tokens)) / max(1, len(encoded))
    whole = round(mean * len(scored))
    return whole + work_of(encode_items(written, tokenizer, length, where), batch_tokens)
