"""What a choice of members costs, from the passes that it asks for. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from motet.models.config import ModelConfig
from motet.models.counts import (
    block_training_flops_per_token,
    head_training_flops_per_token,
    training_flops_per_token,
)
from motet.models.family.base import WHOLE, Family, choices
from motet.models.member import Choice, Member, Term


def choice_flops(choice: Choice, whole: ModelConfig, sequence_length: int) -> float:
    """Return the floating-point operations for one token of everything that a choice runs."""
    return sum(term_flops(term, whole, sequence_length) for term in passes_of(choice))


def passes_of(choice: Choice) -> Choice:
    """Return every pass that a choice runs: a kept teacher that it follows first, which has the
    whole model's sizes and no gradient.
    """
    teacher = (Term(None, 0.0),) if any(term.kept for term in choice) else ()
    return (*teacher, *choice)


class MeanPasses(NamedTuple):
    """How often members pass over a token in a mean step.

    Attributes:
        passes: by name; a pass without gradient is a third of one.
        taught: some member follows a teacher.
    """

    passes: Mapping[str, float]
    taught: bool


def mean_passes(
    family: Family, members: Mapping[str, Member], steps: Sequence[int], draws: int
) -> MeanPasses:
    """Count who trains in some steps."""
    passes: dict[str, float] = {}
    taught = False
    for step in steps:
        for choice in choices(family, members, step, draws) or [(Term(None),)] * draws:
            for term in passes_of(choice):
                name = WHOLE if term.member is None else term.member.name
                passes[name] = passes.get(name, 0.0) + (1.0 if term.trains else 1 / 3)
                taught = taught or term.distill + term.kept > 0
    tokens = draws * len(steps)  # as shares of a step
    return MeanPasses({name: number / tokens for name, number in passes.items()}, taught)


def lineage_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the operations of a family that grows, and of separate runs of its members.

    Args:
        rows: of each stage in order: `flops_per_token`, and `lineage_tokens` and `lineage_flops` of
            all stages up to its end. Where slices of its model train too, `members` has of each,
            and of the model, `flops_per_token` and the `flops` of its own passes.
    """
    flops = rows[-1]["lineage_flops"]
    equal_cost = equal_tokens = before = 0.0
    for row in rows:
        members = row.get("members") or [{**row, "flops": row["lineage_flops"] - before}]
        equal_cost += sum(before + member["flops"] for member in members)
        equal_tokens += sum(row["lineage_tokens"] * one["flops_per_token"] for one in members)
        before = row["lineage_flops"]
    return {
        "flops": flops,
        "at_equal_cost": equal_cost,
        "at_equal_tokens": equal_tokens,
        "saved_at_equal_cost": 1 - flops / equal_cost if equal_cost else None,
        "saved_at_equal_tokens": 1 - flops / equal_tokens if equal_tokens else None,
    }


@lru_cache(maxsize=4096)
def term_flops(term: Term, whole: ModelConfig, sequence_length: int) -> float:
    """Return those of one pass: of blocks that it skips none, of those that run again as many,
    of each exit another head, and without gradient a third.
    """
    config = whole if term.member is None else term.member.config
    layers = range(whole.n_layers) if term.member is None else term.member.layers
    flops = training_flops_per_token(config, sequence_length)
    for at, layer in enumerate(layers):
        if layer in term.skips:
            flops -= block_training_flops_per_token(config, sequence_length, at)
        elif term.times:
            again = term.times[layer] - 1
            flops += again * block_training_flops_per_token(config, sequence_length, at)
    flops += len(term.exits) * head_training_flops_per_token(config)
    return flops if term.trains else flops / 3
