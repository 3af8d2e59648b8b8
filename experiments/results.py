"""Probe results on disk, and everything the analysis needs, read back from a run folder."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from motet.experiments.analysis import Measured
from motet.experiments.audit import Compliance, per_unit
from motet.experiments.errors import UserError
from motet.experiments.exposures import Question
from motet.experiments.ledger import Stretch
from motet.experiments.library.base import ItemScores
from motet.experiments.plan import PLACEBO_FLAG, Plan
from motet.experiments.steps import Steps


def probe_path(probes: Path, step: int) -> Path:
    """Return the file of the probes at one step."""
    return probes / f"step-{step:08d}.npz"


def write_probe(
    probes: Path, step: int, segment: int, definition_sha256: str, scores: Mapping[str, ItemScores]
) -> None:
    """Write the scores of every experiment that was probed at a step; whole or not at all."""
    arrays: dict[str, Any] = {}
    for name, found in scores.items():
        arrays[f"{name}/logprob"] = found.logprob
        arrays[f"{name}/n_tokens"] = found.n_tokens
        arrays[f"{name}/n_bytes"] = found.n_bytes
        arrays[f"{name}/greedy"] = found.greedy
    facts = {"step": step, "segment": segment, "definition_sha256": definition_sha256}
    arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    path = probe_path(probes, step)
    aside = path.with_name(path.name + ".part")
    with open(aside, "wb") as file:
        file.write(buffer.getvalue())
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_probe(path: Path) -> tuple[dict[str, Any], dict[str, ItemScores]]:
    """Return (facts, scores by experiment) of one probe file; nothing in it is unpickled.

    Raises:
        UserError: the file is damaged.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            facts = json.loads(arrays["facts"].tobytes())
            names = {key.rpartition("/")[0] for key in arrays.files if "/" in key}
            scores = {
                name: ItemScores(
                    arrays[f"{name}/logprob"],
                    arrays[f"{name}/n_tokens"],
                    arrays[f"{name}/n_bytes"],
                    arrays[f"{name}/greedy"],
                )
                for name in names
            }
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"probe {path} cannot be read: {error}") from None
    return facts, scores


@dataclass(frozen=True)
class Probed:
    """The probes of one experiment, in order of steps."""

    steps: list[int]
    scores: list[ItemScores]


def read_probes(probes: Path, stretches: Sequence[Stretch]) -> dict[str, Probed]:
    """Return the probes that measured the lineage: those taken by its segments, at steps that they contributed.

    A probe taken between a checkpoint and a crash is taken again by the segment that resumes, and then replaces the first.
    """
    ranges = {part.segment.segment: (part.start_step, part.stop_step) for part in stretches}
    found: dict[str, Probed] = {}
    for path in sorted(probes.glob("step-*.npz")):
        facts, scores = read_probe(path)
        first, last = ranges.get(facts["segment"], (1, 0))
        if first <= facts["step"] <= last:
            for name, part in scores.items():
                entry = found.setdefault(name, Probed([], []))
                entry.steps.append(facts["step"])
                entry.scores.append(part)
    return found


def measure(
    questions: Sequence[Question],
    probed: Mapping[str, Probed],
    plan: Plan,
    steps: Steps,
    audit: Compliance,
) -> list[Measured]:
    """Join questions, probes and what the ledger says was consumed; experiments without a probe are left out."""
    rows = plan.exposures()
    rows_step = steps.step_of(rows.slot)
    one = np.ones(len(rows), dtype=np.int64)
    lengths = plan.row_lengths()
    measured = []
    for question in questions:
        if question.name not in probed:
            continue
        number = plan.experiments.index(question.name)
        n_units = len(question.units)
        placebos = not question.experiment.inserts_units
        mine = (rows.experiment == number) & (((rows.flags & PLACEBO_FLAG) > 0) == placebos)
        by_unit: list[list[int]] = [[] for _ in range(n_units)]
        for unit, step in zip(rows.unit[mine], rows_step[mine], strict=True):
            by_unit[int(unit)].append(int(step))
        lost = mine & audit.due & (audit.applied == 0)
        measured.append(
            Measured(
                experiment=question.experiment,
                units=question.units,
                arms=question.arms,
                timing=question.timing,
                design=question.design,
                steps=np.array(probed[question.name].steps, dtype=np.int64),
                scores=probed[question.name].scores,
                planned=per_unit(plan, number, n_units, one, placebos),
                consumed=per_unit(plan, number, n_units, audit.applied, placebos),
                exposure_steps=[np.array(sorted(found), dtype=np.int64) for found in by_unit],
                loss_tokens_skipped=int(lengths[lost].sum()),
            )
        )
    return measured
