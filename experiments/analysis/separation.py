"""How well an attacker tells shown units from held-out ones by a score: AUC, and the share of shown
units that are recognized at a given share of false alarms.

These are figures of a comparison of two groups, not means over units, so they are descriptions with
intervals; the test is that of the rank outcome (`library.membership`).

Shapes: U units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.experiments.analysis.answers import Answer

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]
FALSE_ALARMS = (0.1, 0.01)
OUTSIDE = 0.05


def separations(study: Answer) -> list[dict[str, Any]]:
    """One row for every score, group of units (`Experiment.membership_by`) and arm with a dose."""
    m, experiment = study.m, study.m.experiment
    by = experiment.membership_by
    group_U = np.array([str(unit.attributes.get(by, "")) if by else "" for unit in m.units])
    rows = []
    for name in experiment.membership:
        values = study.final.get(name, np.full(len(m.units), np.nan))
        for group in dict.fromkeys(group_U.tolist()):
            mine = (group_U == group) & np.isfinite(values)
            held_out = mine & ~study.treated_U
            for number, arm in enumerate(study.spec.arms):
                shown = mine & (m.arms == number)
                if arm.is_control or not shown.any() or not held_out.any():
                    continue
                clusters = [len(np.unique(study.clusters_U[who])) for who in (shown, held_out)]
                found = separation(values[shown], values[held_out], *clusters)
                rows.append({"outcome": name, "group": group, "arm": arm.name, **found})
    return rows


def separation(
    shown: F64, held_out: F64, n_shown: int | None = None, n_held_out: int | None = None
) -> dict[str, Any]:
    """AUC and true-positive rates of one score, each with a 95 % interval.

    Args:
        shown, held_out: finite values; higher speaks for "was shown".
        n_shown, n_held_out: independent values among them (clusters), where fewer.
    """
    clusters = (n_shown or len(shown), n_held_out or len(held_out))
    auc = area(shown, held_out)
    low, high = area_interval(auc, *clusters)
    return {
        "n": len(shown),
        "n_held_out": len(held_out),
        "auc": auc,
        "low": low,
        "high": high,
        "recognized": [
            {"false_alarms": rate, **recognized(shown, held_out, rate, *clusters)}
            for rate in FALSE_ALARMS
        ],
    }


def area(shown: F64, held_out: F64) -> float:
    """P(a shown unit's value exceeds a held-out one's), ties counted half."""
    ordered = np.sort(held_out)
    below = np.searchsorted(ordered, shown, side="left")
    not_above = np.searchsorted(ordered, shown, side="right")
    return float((below + not_above).mean() / (2 * len(ordered)))


def area_interval(auc: float, n_shown: int, n_held_out: int) -> tuple[float, float]:
    """95 % interval of an AUC: all values whose own standard error (Hanley and McNeil 1982, with
    the mean of both sizes) they lie within. Newcombe, Statistics in Medicine 25 (2006), method 5.

    It does not collapse where all shown values are above all held-out ones.
    """
    from scipy.optimize import brentq
    from scipy.stats import norm

    z = float(norm.ppf(1 - OUTSIDE / 2))
    half = (n_shown + n_held_out) / 2 - 1

    def excess(theta: float) -> float:
        spread = 1 + half * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        variance = theta * (1 - theta) * spread / (n_shown * n_held_out)
        return (theta - auc) ** 2 - z * z * variance

    edge = 1e-9  # the variance is 0 at 0 and 1, which would be roots of their own
    inside = min(max(auc, edge), 1 - edge)
    low = 0.0 if auc <= edge else float(brentq(excess, 0.0, inside))
    high = 1.0 if auc >= 1 - edge else float(brentq(excess, inside, 1.0))
    return low, high


def recognized(
    shown: F64, held_out: F64, false_alarms: float, n_shown: int, n_held_out: int
) -> dict[str, Any]:
    """Share of shown units above the value that at most `false_alarms` of held-out units exceed.

    The interval is exact and wide: the threshold's own (order statistics of held-out values) and
    the share's (Clopper and Pearson), each at half of what may lie outside. Held-out units too few
    to know the threshold leave its lower end at 0.
    """
    from scipy.stats import beta

    ordered = np.sort(held_out)
    n = len(ordered)
    allowed = math.floor(false_alarms * n + 1e-9)
    threshold = ordered[n - 1 - allowed] if allowed < n else -math.inf
    lower, upper = threshold_interval(ordered, n_held_out, false_alarms)
    least = float((shown > upper).mean()) * n_shown
    most = float((shown > lower).mean()) * n_shown
    tail = OUTSIDE / 4
    return {
        "share": float((shown > threshold).mean()),
        "low": float(beta.ppf(tail, least, n_shown - least + 1)) if least > 0 else 0.0,
        "high": float(beta.ppf(1 - tail, most + 1, n_shown - most)) if most < n_shown else 1.0,
    }


def threshold_interval(
    ordered: F64, n_independent: int, false_alarms: float
) -> tuple[float, float]:
    """Where the value that a share `false_alarms` exceeds lies, with 97.5 % confidence; infinite
    where so few values cannot tell.

    Args:
        ordered: float64, ascending.
        n_independent: how many of them count as independent.
    """
    from scipy.stats import binom

    tail, n = OUTSIDE / 4, n_independent
    # How many of n values lie at or below the true threshold is binomial.
    ranks = np.arange(1, n + 1)
    at_least = binom.sf(ranks - 1, n, 1 - false_alarms)  # P(value number r is below it)
    at_most = binom.cdf(ranks - 1, n, 1 - false_alarms)  # P(value number r is above it)
    lows, highs = ranks[at_least >= 1 - tail], ranks[at_most >= 1 - tail]
    scale = len(ordered) / n
    low = ordered[int((lows[-1] - 1) * scale)] if len(lows) else -math.inf
    high = ordered[min(len(ordered) - 1, int(highs[0] * scale) - 1)] if len(highs) else math.inf
    return float(low), float(high)


def separation_notes(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A sentence for every group and arm, of the first score alone; report.json has all."""
    found = []
    for row in rows:
        if row["outcome"] != rows[0]["outcome"]:
            continue
        of = f"{row['group']}, {row['arm']}" if row["group"] else row["arm"]
        shares = "; ".join(
            f"{100 * one['share']:.0f} % recognized at {100 * one['false_alarms']:g} % "
            f"false alarms ({100 * one['low']:.0f} to {100 * one['high']:.0f})"
            for one in row["recognized"]
        )
        found.append(
            f"Told apart by {row['outcome']} ({of}): AUC {row['auc']:.2f} ({row['low']:.2f} to "
            f"{row['high']:.2f}), {row['n']} shown, {row['n_held_out']} held out; {shares}."
        )
    return found
