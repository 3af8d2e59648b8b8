"""Calibrates the cost model on some rows of a table, and scores it on others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from planner_rows import Observation
from scipy.stats import kendalltau, spearmanr

from motet.parallel.cluster.constants import DEFAULTS, Constants
from motet.parallel.cluster.devices import DEFAULT_LINKS, DEVICES, LINKS
from motet.parallel.cost.fit import fit, fit_memory
from motet.parallel.cost.stages import Prediction, Predictor

TIME_CONSTANTS: dict[str, tuple[str, ...]] = {
    # At most four for time, and two for memory where a table has runs that ran out of it.
    "scaling": ("matmul", "bandwidth", "intra", "inter"),
    "vtrain": ("matmul", "bandwidth", "intra", "inter"),
    "amp": ("matmul", "intra", "inter"),
    "mpt": ("matmul",),
    "torchtitan": ("matmul",),
    "korthikanti": ("matmul",),
    "mixtral": ("routing", "grouped"),
}
MEMORY_SOURCES = ("scaling",)
MOST_ROWS = 150
"""Of a longer table, every n-th row is fitted to."""
FEWEST_ALIKE = 10
VTRAIN_SINGLE = ("matmul", "intra", "host_us")

Calibrated = dict[str, Constants]


def start(kind: str) -> Constants:
    """Return what ships for a kind of device, its efficiency written out."""
    known = DEFAULTS.get(kind, Constants())
    return replace(known, matmul=known.matmul or float(DEVICES[kind]["matmul_efficiency"]))


def kinds(observation: Observation) -> list[str]:
    """Return the kinds of devices of a run."""
    return sorted({group.device.kind for group in observation.cluster.groups})


def predictor(observation: Observation, constants: Mapping[str, Constants]) -> Predictor:
    """Return what predicts layouts of a run's model and machines."""
    one = observation
    return Predictor(one.model, one.cluster, one.training, one.traits, constants)


def predicted(observation: Observation, constants: Mapping[str, Constants]) -> Prediction:
    """Return the prediction for a run."""
    return predictor(observation, constants).predict(observation.layout)


def alike(fitted: Sequence[Observation], rows: Sequence[Observation]) -> list[Observation]:
    """Return the runs to fit that stand as those to check do: on one node or on several, if there
    are enough of them.
    """
    wanted = {_over_nodes(row) for row in rows}
    found = [row for row in fitted if _over_nodes(row) in wanted]
    return found if len(found) >= FEWEST_ALIKE else list(fitted)


def _over_nodes(row: Observation) -> bool:
    return sum(group.nodes for group in row.cluster.groups) > 1


def calibrate(rows: Sequence[Observation]) -> tuple[Calibrated, list[str]]:
    """Return constants by kind of device, fitted to measured runs, and lines that say what was
    found.
    """
    by_kind: dict[str, list[Observation]] = defaultdict(list)
    for row in rows:
        if len(kinds(row)) == 1:
            by_kind[kinds(row)[0]].append(row)
    found: Calibrated = {}
    told = []
    for kind, own in by_kind.items():
        found[kind], line = _calibrate_kind(kind, own)
        told.append(line)
    return found, told


def _calibrate_kind(kind: str, rows: list[Observation]) -> tuple[Constants, str]:
    timed = [row for row in rows if row.step_time_s is not None]
    timed = timed[:: -(-len(timed) // MOST_ROWS)] if timed else []
    names = TIME_CONSTANTS[rows[0].source]
    if rows[0].source == "vtrain" and not any(map(_over_nodes, rows)):
        names = VTRAIN_SINGLE  # one node says nothing about networks
    first = start(kind)
    constants, line = first, f"{kind}: no measured run, defaults"
    if len(timed) >= len(names):
        result = fit(
            names,
            first,
            [_timer(row, kind) for row in timed],
            [row.step_time_s or 0.0 for row in timed],
        )
        most = max(row.layout.world_size for row in timed)
        constants = replace(result.constants, most_devices=most)
        shown = ", ".join(f"{name}={getattr(constants, name):.3g}" for name in names)
        line = f"{kind}: {shown}; median error {result.median_error:.1%} of {len(timed)} runs"
        if result.at_bounds:
            line += f"; at a bound: {', '.join(result.at_bounds)}"
    labelled = [row for row in rows if row.out_of_memory is not None]
    if rows[0].source in MEMORY_SOURCES and any(row.out_of_memory for row in labelled):
        fills = [_filler(row) for row in labelled]
        constants = fit_memory(constants, fills, [bool(row.out_of_memory) for row in labelled])
        line += f"; activation={constants.activation:.3g}, logits={constants.logits:.3g}"
    return constants, line


def _timer(row: Observation, kind: str) -> Callable[[Constants], float]:
    return lambda constants: predicted(row, {kind: constants}).step_time_s


def _filler(row: Observation) -> Callable[[Constants], float]:
    """Return constants -> share of memory; blocks are costed once, since these constants do not
    change them.
    """
    made = predictor(row, {})

    def fill(constants: Constants) -> float:
        made.constants = [constants] * len(made.constants)
        made.forget_memory()
        return made.fill(row.layout)

    return fill


def constants_for(row: Observation, calibrated: Calibrated) -> Calibrated:
    """Return constants for a run; a kind that was not fitted gets those of one that was, scaled to
    its efficiency.

    What collectives reach inside a node says something of links of the same kind only.
    """
    if not calibrated:
        return {kind: start(kind) for kind in kinds(row) if kind in DEFAULTS}
    known, model = next(iter(calibrated.items()))
    out = {}
    for kind in kinds(row):
        if kind in calibrated:
            out[kind] = calibrated[kind]
        else:
            scale = (model.matmul or 1.0) / (start(known).matmul or 1.0)
            usual = start(kind)
            same = LINKS[DEFAULT_LINKS[kind]]["kind"] == LINKS[DEFAULT_LINKS[known]]["kind"]
            out[kind] = replace(
                model,
                matmul=min(0.95, scale * (usual.matmul or 1.0)),
                intra=model.intra if same else usual.intra,
            )
    return out


@dataclass(frozen=True)
class Answer:
    """What an estimator says of a run; None where it says nothing."""

    time_s: float | None
    fits: bool | None
    low_s: float = 0.0
    high_s: float = 0.0
    memory_gib: float | None = None


def answers(rows: Sequence[Observation], calibrated: Calibrated) -> list[Answer]:
    """Return Motet's predictions."""
    found = []
    for row in rows:
        told = predicted(row, constants_for(row, calibrated))
        found.append(Answer(told.step_time_s, told.fits, *told.interval_s, told.memory_gib))
    return found


def scores(rows: Sequence[Observation], said: Sequence[Answer]) -> dict[str, Any]:
    """Return how good predictions of one group of runs are."""
    timed = [
        (row.step_time_s, answer.time_s, row, answer)
        for row, answer in zip(rows, said, strict=True)
        if row.step_time_s is not None and answer.time_s is not None
    ]
    out: dict[str, Any] = {"n": len(timed), "mape": None, "spearman": None, "kendall": None}
    if timed:
        true, told = np.array([t[0] for t in timed]), np.array([t[1] for t in timed])
        out["mape"] = float(np.mean(np.abs(told / true - 1.0)))
        out["bias"] = float(np.mean(told / true - 1.0))
        # An estimator that says the same of all has no order.
        ranked = len(timed) > 2 and float(np.ptp(told)) > 0 and float(np.ptp(true)) > 0
        out["spearman"] = float(spearmanr(told, true)[0]) if ranked else None
        out["kendall"] = float(kendalltau(told, true)[0]) if ranked else None
        inside = [answer.low_s <= time <= answer.high_s for time, _, _, answer in timed]
        out["interval_coverage"] = float(np.mean(inside))
        errors = [
            abs(row.mfu_flops / row.peak_flops * (1 / time - 1 / guess))
            for time, guess, row, _ in timed
        ]
        out["mfu_error_points"] = 100 * float(np.mean(errors))
        out["largest_mfu_error_points"] = 100 * float(np.max(errors))
    out |= _choice(rows, said) | _memory(rows, said)
    return out


def _choice(rows: Sequence[Observation], said: Sequence[Answer]) -> dict[str, Any]:
    """Return what choosing the layout that is predicted fastest costs, over runs that do the same
    work on the same machines.
    """
    alike: dict[Any, list[tuple[Observation, Answer]]] = defaultdict(list)
    for row, answer in zip(rows, said, strict=True):
        if answer.time_s is not None:
            key = (
                row.model.d_model,
                row.model.n_layers,
                row.training.sequences,
                row.training.sequence_length,
            )
            alike[(*key, row.layout.world_size)].append((row, answer))
    regrets, first_fits = [], []
    for found in alike.values():
        best = max(
            (row.mfu_flops / row.step_time_s for row, _ in found if row.step_time_s), default=None
        )
        if best is None or len(found) < 2:
            continue
        order = sorted(
            (pair for pair in found if pair[1].fits is not False),
            key=lambda pair: pair[1].time_s or 0.0,
        )
        if not order:
            continue
        first_fits.append(not order[0][0].out_of_memory)
        chosen = next((row for row, _ in order if row.step_time_s), None)
        if chosen is not None and chosen.step_time_s:
            regrets.append(100 * (best - chosen.mfu_flops / chosen.step_time_s) / chosen.peak_flops)
    return {
        "regret_mfu_points": float(np.mean(regrets)) if regrets else None,
        "first_choice_fits": bool(all(first_fits)) if first_fits else None,
    }


def _memory(rows: Sequence[Observation], said: Sequence[Answer]) -> dict[str, Any]:
    labelled = [
        (row.out_of_memory, not answer.fits)
        for row, answer in zip(rows, said, strict=True)
        if row.out_of_memory is not None and answer.fits is not None
    ]
    peaks = [
        abs(answer.memory_gib / row.peak_gib - 1.0)
        for row, answer in zip(rows, said, strict=True)
        if row.peak_gib is not None and answer.memory_gib is not None
    ]
    return {
        "oom_n": len(labelled),
        "oom_accuracy": float(np.mean([a == b for a, b in labelled])) if labelled else None,
        "false_fit_rate": float(np.mean([a and not b for a, b in labelled])) if labelled else None,
        "peak_memory_mape": float(np.mean(peaks)) if peaks else None,
    }


def by_group(
    rows: Sequence[Observation], said: Sequence[Answer], file: str
) -> dict[str, dict[str, Any]]:
    """Return scores by "file/set/model"."""
    found: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        found[f"{file}/{row.group[1]}/{row.group[0]}"].append(i)
    return {
        name: scores([rows[i] for i in mine], [said[i] for i in mine])
        for name, mine in found.items()
    }
