"""Does the model remember when it read what? The log-likelihood of shown units against the step at
which each was shown.

Source: "Blackbox Model Provenance via Palimpsestic Membership Inference" (arXiv 2510.19796): the
rank correlation of log-likelihood with the order of a shuffled training run, judged by what other
orders would have given. Here the order is the run's own randomization, so the permutation test
repeats what was drawn: which cluster got which time, within blocks.

Shapes: U units, N clusters that were shown, D permutations.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.answers import Answer
from motet.experiments.stream.random import name_key

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
FEWEST = 5
OUTSIDE = 0.05


def order_test(study: Answer) -> dict[str, Any] | None:
    """Return the rank correlation of an experiment's `order` outcome with the step of a unit's last
    exposure, or None where fewer than `FEWEST` clusters were shown.
    """
    m = study.m
    values = study.final.get(m.experiment.order, np.full(len(m.units), np.nan))
    last = np.array([when[-1] if len(when) else -1 for when in m.exposure_steps], dtype=np.float64)
    mine = np.flatnonzero(study.treated_U & (last >= 0) & np.isfinite(values))
    clusters, row = np.unique(study.clusters_U[mine], return_inverse=True)
    if len(clusters) < FEWEST:
        return None
    count = np.bincount(row)
    value, step = (np.bincount(row, weights=x[mine]) / count for x in (values, last))
    key = name_key(study.seed, "order")
    found = correlation(value, step, m.design.block_of_cluster[clusters], key, study.repeater.draws)
    return {"outcome": m.experiment.order, **found}


def correlation(value_N: F64, step_N: F64, block_N: I64, key: int, draws: int) -> dict[str, Any]:
    """Spearman's correlation with a permutation test within blocks, two-sided, and a 95 % interval
    (Fisher's z with the variance of Bonett and Wright, Psychometrika 65, 2000).

    The p-value counts the order that was drawn, so it is never below 1 / (draws + 1).
    """
    from scipy.stats import norm, rankdata

    x, y = (rankdata(part) - (len(value_N) + 1) / 2 for part in (value_N, step_N))
    scale = math.sqrt(float(x @ x) * float(y @ y))
    if scale == 0.0:
        return {"correlation": None, "low": None, "high": None, "p": None, "n": len(value_N)}
    rho = float(x @ y) / scale
    generator = np.random.Generator(np.random.Philox(key=key))
    by_block = np.argsort(block_N, kind="stable")
    more = 0
    for start in range(0, draws, 1000):
        some = min(1000, draws - start)
        noise = generator.random((some, len(x))) + block_N[by_block]
        # Sorting (block + chance) permutes places inside each block only.
        shuffled = y[by_block][np.argsort(noise, axis=1)]
        more += int(np.sum(np.abs(shuffled @ x[by_block]) >= abs(float(x @ y)) * (1 - 1e-12)))
    reach = float(norm.ppf(1 - OUTSIDE / 2)) * math.sqrt((1 + rho**2 / 2) / (len(x) - 3))
    middle = math.atanh(min(max(rho, -1 + 1e-12), 1 - 1e-12))
    return {
        "correlation": rho,
        "low": math.tanh(middle - reach),
        "high": math.tanh(middle + reach),
        "p": (1 + more) / (1 + draws),
        "n": len(value_N),
    }


def order_note(found: dict[str, Any]) -> str:
    """The correlation in a sentence."""
    if found["correlation"] is None:
        return "Order of training: values or steps are all alike, so there is no correlation."
    return (
        f"Order of training: rank correlation of {found['outcome']} with the step of the last "
        f"exposure {found['correlation']:.2f} ({found['low']:.2f} to {found['high']:.2f}), "
        f"p = {found['p']:.2g} by {found['n']} clusters in other orders."
    )
