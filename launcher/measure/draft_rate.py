"""How well members of a family draft for a larger one, on text that the run never read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from motet.core.errors import UserError
from motet.experiments.corpora.inspection import load_tokenizer
from motet.experiments.stream.stream import IGNORED_LABEL
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.manifest import open_corpora, open_stream
from motet.models import counts, drafts
from motet.models.decoder import Decoder
from motet.models.family.base import WHOLE, Member
from motet.models.member import name_of

SEARCHED = 64
"""Times as many slots as are asked for are searched for text that was not read."""


class HeldOut(NamedTuple):
    """One sequence of text.

    Attributes:
        tokens: int64 [T].
        scored: bool [T], where a next token is predicted.
        documents: int32 [T], numbers of documents, where the run masks them.
    """

    tokens: npt.NDArray[np.int64]
    scored: npt.NDArray[np.bool_]
    documents: npt.NDArray[np.int32] | None


def text_of_file(settings: RunSettings, path: Path) -> Iterator[HeldOut]:
    """Yield the sequences of a file of text.

    Raises:
        UserError: it cannot be read, is too short, or the run has no tokenizer.
    """
    tokenizer = load_tokenizer(open_corpora(settings)[0])
    if tokenizer is None:
        raise UserError("--text: the run's corpus has no tokenizer; leave it out")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"--text: {path} cannot be read as UTF-8: {error}") from None
    tokens = np.asarray(tokenizer.encode(text), dtype=np.int64)
    length = settings.data.sequence_length
    if len(tokens) < 2:
        raise UserError(f"--text: {path} has {len(tokens)} tokens; at least 2")
    for start in range(0, len(tokens) - 1, length):
        part = tokens[start : start + length]
        yield HeldOut(part, np.arange(len(part)) < len(part) - 1, None)


def unread_text(settings: RunSettings, trained: int, sequences: int) -> Iterator[HeldOut]:
    """Yield sequences of the run's corpora that come after those that it read.

    Args:
        trained: steps that the run made.
        sequences: at most so many.

    Raises:
        UserError: the run read everything.
    """
    stream = open_stream(settings)
    first = settings.slots_before(max(trained, settings.steps))
    slots = np.arange(first, first + SEARCHED * sequences, dtype=np.int64)
    _, epochs, _ = stream.locate(slots)
    unread = slots[epochs == 0][:sequences]
    if not len(unread):
        raise UserError(
            f"the run read its corpora to the end in {first:,} sequences: none is left that it did "
            "not see; give text of your own with --text FILE"
        )
    for slot in unread:
        batch = stream.batch(int(slot), 1)
        ids = batch.document_ids_BT
        yield HeldOut(
            batch.tokens_BT[0].astype(np.int64),
            batch.labels_BT[0] != IGNORED_LABEL,
            None if ids is None else ids[0],
        )


def draft_rates(
    decoder: Decoder,
    target: Member | None,
    members: Sequence[Member],
    text: Iterator[HeldOut],
    ahead: int | None,
) -> dict[str, Any]:
    """Return how well each member drafts for the target.

    `*_error` is the standard error over sequences. Costs are of floating-point operations.

    Args:
        ahead: tokens drafted per pass; None: the number with the largest predicted speed-up.
    """
    greedy: dict[str, list[float]] = {member.name: [] for member in members}
    sampled: dict[str, list[float]] = {member.name: [] for member in members}
    tokens = length = 0
    for one in text:
        row = torch.from_numpy(one.tokens)[None]
        ids = None if one.documents is None else torch.from_numpy(one.documents)[None]
        scored = torch.from_numpy(one.scored)
        tokens, length = tokens + int(scored.sum()), max(length, len(one.tokens))
        with torch.no_grad():
            wanted = decoder(row, document_ids_BT=ids, member=target)[:, scored]
            for member in members:
                found = decoder(row, document_ids_BT=ids, member=member)[:, scored]
                rates = drafts.acceptance(wanted, found)
                greedy[member.name].append(rates.greedy.mean().item())
                sampled[member.name].append(rates.sampled.mean().item())
    config = decoder.config if target is None else target.config
    rows = [
        _row(member, cost_of(member, config, length), greedy, sampled, ahead) for member in members
    ]
    return {"target": name_of(target) or WHOLE, "tokens": tokens, "drafts": rows}


def cost_of(member: Member, target: Any, length: int) -> float:
    """Return the operations of a draft's token over those of a target's."""
    return counts.training_flops_per_token(member.config, length) / (
        counts.training_flops_per_token(target, length)
    )


def _row(
    member: Member,
    cost: float,
    greedy: dict[str, list[float]],
    sampled: dict[str, list[float]],
    ahead: int | None,
) -> dict[str, Any]:
    agrees, accepts = greedy[member.name], sampled[member.name]
    rate = float(np.mean(accepts))
    chosen = drafts.best_ahead(rate, cost) if ahead is None else ahead
    return {
        "member": member.name,
        "parameters": counts.parameters(member.config),
        "cost": cost,
        "greedy_agreement": float(np.mean(agrees)),
        "greedy_agreement_error": _error(agrees),
        "acceptance": rate,
        "acceptance_error": _error(accepts),
        "ahead": chosen,
        "tokens_per_pass": drafts.tokens_per_pass(rate, chosen),
        "predicted_speed_up": drafts.speed_up(rate, chosen, cost),
    }


def _error(values: Sequence[float]) -> float | None:
    return None if len(values) < 2 else float(np.std(values, ddof=1) / math.sqrt(len(values)))
