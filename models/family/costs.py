"""What a choice of members costs, from the passes that it asks for. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from motet.models.config import ModelConfig
from motet.models.counts import (
    block_training_flops_per_token,
    head_training_flops_per_token,
    training_flops_per_token,
)
from motet.models.member import Choice, Term


def choice_flops(choice: Choice, whole: ModelConfig, sequence_length: int) -> float:
    """Return the floating-point operations for one token of everything that a choice runs."""
    return sum(term_flops(term, whole, sequence_length) for term in passes_of(choice))


def passes_of(choice: Choice) -> Choice:
    """Return every pass that a choice runs: a kept teacher that it follows first, which has the
    whole model's sizes and no gradient.
    """
    teacher = (Term(None, 0.0),) if any(term.kept for term in choice) else ()
    return (*teacher, *choice)


def lineage_totals(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the operations of a family that grows, and of separate runs of its members.

    Args:
        rows: of each stage in order: `flops_per_token`, and `lineage_tokens` and `lineage_flops` of
            all stages up to its end.
    """
    flops = rows[-1]["lineage_flops"]
    equal_cost = sum(row["lineage_flops"] for row in rows)
    equal_tokens = sum(row["lineage_tokens"] * row["flops_per_token"] for row in rows)
    return {
        "flops": flops,
        "at_equal_cost": equal_cost,
        "at_equal_tokens": equal_tokens,
        "saved_at_equal_cost": 1 - flops / equal_cost if equal_cost else None,
        "saved_at_equal_tokens": 1 - flops / equal_tokens if equal_tokens else None,
    }


@lru_cache(maxsize=4096)
def term_flops(term: Term, whole: ModelConfig, sequence_length: int) -> float:
    """Return those of one pass: of blocks that it skips none, of each exit another head, and
    without gradient a third.
    """
    config = whole if term.member is None else term.member.config
    layers = range(whole.n_layers) if term.member is None else term.member.layers
    flops = training_flops_per_token(config, sequence_length)
    for at, layer in enumerate(layers):
        if layer in term.skips:
            flops -= block_training_flops_per_token(config, sequence_length, at)
    flops += len(term.exits) * head_training_flops_per_token(config)
    return flops if term.trains else flops / 3
