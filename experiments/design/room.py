"""Whether an experiment of very many units can have room in a run at all, by arithmetic: before a
unit is made.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from motet.core.errors import Problem, UserError
from motet.core.parsing import parse_json
from motet.experiments.corpora.tokenizer import Tokenizer
from motet.experiments.design.experiment import Kinds, make
from motet.experiments.design.spec import ExperimentSpec
from motet.experiments.design.units import checked_unit
from motet.experiments.types import Unit

FEW_UNITS = 1000
"""So many are read, assigned and placed within a second or two, which finds out more."""
SAMPLE = 64
SLACK = 0.5
"""The first units are this much longer than the rest, at most, before it is taken for certain that
there is no room.
"""
WRAPPING_TOKENS = 2


def room_problem(
    spec: ExperimentSpec, kinds: Kinds, tokenizer: Tokenizer | None, room_tokens: int
) -> Problem | None:
    """Return what to say of an experiment whose exposures cannot all be in the run, judged by its
    number of units, its doses and its first units; None where that is not certain.

    Args:
        tokenizer: None where it is not known: then every text has one token.
        room_tokens: of the whole run.

    Raises:
        UserError: its file of items cannot be read.
    """
    if spec.dose_in != "exposures":
        return None
    count = _count(spec)
    weights = np.array([arm.weight for arm in spec.arms], dtype=float)
    doses = np.array([arm.dose for arm in spec.arms], dtype=float)
    exposures = count * float(weights @ doses) / float(weights.sum())
    if count <= FEW_UNITS:
        return None
    lengths = [1]
    if tokenizer is not None:
        units = _first_units(spec, kinds)
        if not units:
            return None
        lengths = [len(ids) for ids in tokenizer.encode_batch([unit.texts[0] for unit in units])]
    tokens = exposures * (WRAPPING_TOKENS + float(np.mean(lengths)))
    if tokens * SLACK <= room_tokens:
        return None
    return Problem(
        f"experiments.{spec.name}",
        f"has {count:,} units, which ask for about {exposures:,.0f} exposures, at least "
        f"{tokens * SLACK:,.0f} tokens; the whole run has {room_tokens:,}. Give fewer units, lower "
        "the doses, or lengthen the run",
    )


def _count(spec: ExperimentSpec) -> int:
    """How many units are asked for; of a file the lines that hold something."""
    if spec.items is None:
        return int(spec.generate["count"])
    try:
        with open(spec.items, "rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise UserError(f"{spec.items}: cannot be read: {error}") from error


def _first_units(spec: ExperimentSpec, kinds: Kinds) -> list[Unit]:
    """The first units; [] where a row is wrong, which reading all of them tells better."""
    experiment = make(spec, kinds)
    try:
        rows = _first_rows(spec.items) if spec.items is not None else None
        if rows is None:
            rows = experiment.generate_rows(SAMPLE, spec.generate["seed"])
        return [checked_unit(experiment, row) for row in rows]
    except Exception:  # of a user's class, or its file
        return []


def _first_rows(path: Path) -> list[Any]:
    with open(path, encoding="utf-8") as file:
        head = [line for line in islice(file, 4 * SAMPLE) if line.strip()][:SAMPLE]
    return [parse_json(line) for line in head]
