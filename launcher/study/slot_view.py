"""One training sequence in words: where it comes from, what the plan lays over it, and its text."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import UserError
from motet.core.parsing import parse_json
from motet.experiments.corpora.inspection import load_tokenizer
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.stream.exposure_plan import ExposurePlan
from motet.experiments.stream.part import CorpusPart
from motet.experiments.stream.placement import PLACEBO_FLAG
from motet.launcher.config.sections import RunSettings
from motet.launcher.runs.manifest import open_stream, training_sources

PLAN_FILE = "exposures.plan"


def view_slot(settings: RunSettings, slot: int, plan_folder: Path | None) -> dict[str, Any]:
    """Slot `slot` of a run, with the plan in `plan_folder` laid over it (None: the clean stream).

    Raises `UserError` for a slot outside the run.
    """
    slots = settings.slots_before(settings.steps)
    if not 0 <= slot < slots:
        raise UserError(f"--slot {slot:,} is outside the run, which has slots 0 to {slots - 1:,}")
    plan = ExposurePlan(plan_folder / PLAN_FILE) if plan_folder else None
    stream = open_stream(settings, plan)
    number, epoch, sequence = (int(a[0]) for a in stream.locate(np.array([slot], dtype=np.int64)))
    source, length = training_sources(settings)[number], settings.data.sequence_length
    corpus = source.corpus if isinstance(source, CorpusPart) else source
    tokenizer = load_tokenizer(corpus)
    tokens = stream.batch(slot, 1).tokens_BT[0].tolist()
    start = sequence * length
    return {
        "slot": slot,
        "step": bisect.bisect_right(range(settings.steps + 1), slot, key=settings.slots_before) - 1,
        "corpus": str(corpus.path),
        "epoch": epoch,
        "sequence": sequence,
        "documents": [
            corpus.document_id(document)
            for document in source.documents_between(start, start + length)
        ],
        "exposures": _exposures(plan, plan_folder, slot, tokenizer) if plan else [],
        "text": _text(tokenizer, tokens),
    }


def _exposures(
    plan: ExposurePlan, folder: Path | None, slot: int, tokenizer: Tokenizer | None
) -> list[dict[str, Any]]:
    """The exposures of one slot, in order of position."""
    first, last = plan.rows_between(slot, slot + 1)
    rows = plan.exposures(first, last)
    found = []
    for i, (offset, tokens) in enumerate(plan.lookup(slot)):
        experiment = plan.experiments[int(rows.experiment[i])]
        found.append(
            {
                "experiment": experiment,
                "unit": _unit_id(folder, experiment, int(rows.unit[i])),
                "repetition": int(rows.repetition[i]),
                "placebo": bool(rows.flags[i] & PLACEBO_FLAG),
                "offset": offset,
                "n_tokens": len(tokens),
                "text": _text(tokenizer, tokens.tolist()),
            }
        )
    return found


def _unit_id(folder: Path | None, experiment: str, unit: int) -> str:
    """The unit's own name, out of the frozen units."""
    path = (folder or Path()) / "units" / f"{experiment}.jsonl"
    try:
        line = path.read_text(encoding="utf-8").split("\n")[unit]
        return str(parse_json(line)["id"])
    except (OSError, IndexError, ValueError, KeyError):
        return str(unit)


def _text(tokenizer: Tokenizer | None, tokens: Sequence[int]) -> str:
    return tokenizer.decode(tokens) if tokenizer else " ".join(str(token) for token in tokens)
