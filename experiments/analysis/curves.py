"""The curves of the report: group means with intervals, by dose, over time, and since exposure.

Shapes: S probe steps, U units.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.format import percent
from motet.experiments.types import OutcomeSpec

F64 = npt.NDArray[np.float64]
I64 = npt.NDArray[np.int64]

RESAMPLINGS = 200
FEWEST_LAGS_TO_FIT = 4

Bounds = tuple[float | None, float | None]
"""The least and the most that is possible; None is no end."""
ENDLESS: Bounds = (None, None)


def mean_interval(
    values: F64, clusters: I64, alpha: float, binary: bool = False, ends: Bounds = ENDLESS
) -> tuple[float | None, float | None, float | None, int]:
    """(mean, low, high, n) of the finite values; the interval counts clusters, not units.

    A t-interval with a cluster-robust standard error, or for shares Wilson's interval at the number
    of clusters. No interval for fewer than two clusters. An interval stops at the `ends` of the
    possible range; that leaves out no mean that could be.
    """
    finite = np.isfinite(values)
    n = int(finite.sum())
    if n == 0:
        return None, None, None, 0
    kept = values[finite]
    _, number = np.unique(clusters[finite], return_inverse=True)
    n_clusters = int(number.max()) + 1
    mean = float(kept.mean())
    if n_clusters < 2:
        return mean, None, None, n
    if binary:
        from statsmodels.stats.proportion import proportion_confint

        low, high = proportion_confint(mean * n_clusters, n_clusters, alpha, method="wilson")
        return mean, float(low), float(high), n
    from scipy.stats import t

    sums = np.bincount(number, weights=kept - mean)
    error = math.sqrt(n_clusters / (n_clusters - 1) * float(sums @ sums)) / n
    reach = float(t.ppf(1 - alpha / 2, n_clusters - 1)) * error
    return mean, _inside(mean - reach, mean, ends), _inside(mean + reach, mean, ends), n


def _inside(end: float, mean: float, ends: Bounds) -> float:
    """An end of the interval of a mean, no further than is possible, never beyond the mean itself:
    a class of the user's own may be wrong about its range.
    """
    least, most = ends
    low = -math.inf if least is None else min(least, mean)
    high = math.inf if most is None else max(most, mean)
    return min(max(end, low), high)


def shown_range(ends: Bounds) -> list[float | None] | None:
    """`range` of a curve in report.json: where its values can lie, null where there is no end."""
    return None if ends == ENDLESS else list(ends)


def named(outcome: OutcomeSpec) -> dict[str, Any]:
    """`label`, `unit` and `chance` of a curve in report.json: what it shows, and where units lie
    that were only guessed (null where that is not known).
    """
    return {"label": outcome.label, "unit": outcome.unit, "chance": outcome.guess}


def dose_response(
    values_U: F64,
    arms_U: I64,
    clusters_U: I64,
    names: Sequence[str],
    doses: Sequence[float],
    alpha: float,
    binary: bool,
    ends: Bounds = ENDLESS,
) -> dict[str, Any]:
    """Mean and interval per arm, by dose; arms without values are left out."""
    curve: dict[str, Any] = {key: [] for key in ("x", "mean", "low", "high", "n", "arms")}
    for arm in np.argsort(np.array(doses), kind="stable").tolist():
        chosen = arms_U == arm
        mean, low, high, n = mean_interval(
            values_U[chosen], clusters_U[chosen], alpha, binary, ends
        )
        if n == 0:
            continue
        row = (doses[arm], mean, low, high, n, names[arm])
        for key, value in zip(curve, row, strict=True):
            curve[key].append(value)
    return curve | {"range": shown_range(ends)}


def over_time(
    values_SU: F64,
    steps_S: I64,
    arms_U: I64,
    clusters_U: I64,
    names: Sequence[str],
    alpha: float,
    binary: bool,
    ends: Bounds = ENDLESS,
) -> list[dict[str, Any]]:
    """One curve per arm: mean and interval at every probe step."""
    series = []
    for arm, name in enumerate(names):
        chosen = arms_U == arm
        if not chosen.any():
            continue
        rows = [
            mean_interval(values_U[chosen], clusters_U[chosen], alpha, binary, ends)
            for values_U in values_SU
        ]
        series.append(
            {
                "arm": name,
                "steps": [int(step) for step in steps_S],
                "mean": [row[0] for row in rows],
                "low": [row[1] for row in rows],
                "high": [row[2] for row in rows],
            }
        )
    return series


def since_exposure(
    values_SU: F64,
    steps_S: I64,
    treated_U: npt.NDArray[np.bool_],
    control_U: npt.NDArray[np.bool_],
    clusters_U: I64,
    exposure_steps: Sequence[I64],
    alpha: float,
    seed: int,
    ends: Bounds = ENDLESS,
) -> tuple[dict[str, Any] | None, str]:
    """Gain of the treated over the held-out units against steps since their last exposure.

    Gain is the change since the last probe before the first exposure, minus the same change in the
    held-out units; the interval is Welch's, and stops where the outcome's `ends` leave no room from
    where the groups began. Only where all treated units share their exposure steps (else None).
    Returns the curve and a sentence on the half-life ("" without one).
    """
    span = _shared_span(exposure_steps, treated_U)
    if span is None or not control_U.any():
        return None, ""
    first, last = span
    before = np.flatnonzero(steps_S <= first)
    after = np.flatnonzero(steps_S > last)
    if len(before) == 0 or len(after) == 0:
        return None, ""
    change_SU = values_SU[after] - values_SU[before[-1]]
    lags = (steps_S[after] - last).astype(np.float64)
    treated = _cluster_means(change_SU[:, treated_U], clusters_U[treated_U])
    control = _cluster_means(change_SU[:, control_U], clusters_U[control_U])
    if min(treated.shape[1], control.shape[1]) < 2:
        return None, ""
    mean, reach = _welch(treated, control, alpha)
    begun = values_SU[before[-1]]
    room = _room(float(np.nanmean(begun[treated_U]) - np.nanmean(begun[control_U])), ends)
    low, high = (
        [_inside(float(end), float(m), room) for end, m in zip(side, mean, strict=True)]
        for side in (mean - reach, mean + reach)
    )
    curve = {"x": [int(lag) for lag in lags], "mean": mean.tolist(), "low": low, "high": high}
    curve["range"] = shown_range(room)
    # A gain that is not there at the first lag, or few lags, give no half-life.
    if mean[0] - reach[0] <= 0 or len(lags) < FEWEST_LAGS_TO_FIT:
        return curve, ""
    return curve, half_life_sentence(lags, treated, control, alpha, seed)


def _room(ahead: float, ends: Bounds) -> Bounds:
    """The least and the most gain of the treated over the held-out units, when the treated were
    `ahead` by so much before: at the end the groups can be one whole range apart.
    """
    low, high = ends
    if low is None or high is None:
        return ENDLESS
    return low - high - ahead, high - low - ahead


def _shared_span(
    exposure_steps: Sequence[I64], treated_U: npt.NDArray[np.bool_]
) -> tuple[int, int] | None:
    """(first, last) step of exposure when all treated units share them, else None."""
    spans = {
        (int(when[0]), int(when[-1]))
        for when, treated in zip(exposure_steps, treated_U.tolist(), strict=True)
        if treated and len(when)
    }
    return spans.pop() if len(spans) == 1 else None


def _cluster_means(values_SU: F64, clusters_U: I64) -> F64:
    """One column per cluster, of the units that have a value at every step."""
    whole = np.isfinite(values_SU).all(axis=0)
    values, clusters = values_SU[:, whole], clusters_U[whole]
    _, number = np.unique(clusters, return_inverse=True)
    member = (number[:, None] == np.arange(int(number.max(initial=-1)) + 1)).astype(np.float64)
    return (values @ member) / member.sum(axis=0)


def _welch(treated: F64, control: F64, alpha: float) -> tuple[F64, F64]:
    """Difference of means and half-width of its interval at every lag."""
    from scipy.stats import t

    n_t, n_c = treated.shape[1], control.shape[1]
    a, b = treated.var(axis=1, ddof=1) / n_t, control.var(axis=1, ddof=1) / n_c
    error = np.sqrt(a + b)
    freedom = (a + b) ** 2 / np.maximum(a**2 / (n_t - 1) + b**2 / (n_c - 1), 1e-300)
    reach = t.ppf(1 - alpha / 2, np.maximum(freedom, 1.0)) * error
    return treated.mean(axis=1) - control.mean(axis=1), np.where(error > 0, reach, 0.0)


def half_life_sentence(lags: F64, treated: F64, control: F64, alpha: float, seed: int) -> str:
    """When half of the gain at the first lag is lost, from a power law fitted to the curve.

    gain(lag) = g lag^-b (Chang et al., arXiv 2406.11813, find that forgetting follows a power law),
    least squares; the interval is the percentile bootstrap over clusters (the columns).
    """
    estimate = _half_life(lags, treated.mean(axis=1) - control.mean(axis=1))
    rng = np.random.Generator(np.random.Philox(key=seed))
    resampled = []
    for _ in range(RESAMPLINGS):
        one = treated[:, rng.integers(treated.shape[1], size=treated.shape[1])].mean(axis=1)
        other = control[:, rng.integers(control.shape[1], size=control.shape[1])].mean(axis=1)
        resampled.append(_half_life(lags, one - other))
    low, high = np.quantile(resampled, [alpha / 2, 1 - alpha / 2], method="inverted_cdf").tolist()
    if estimate > lags[-1]:
        return (
            f"Half of the gain was not lost within the {lags[-1]:.0f} steps that were followed "
            f"(power-law fit; lower end of the interval {min(low, lags[-1]):.0f} steps)."
        )
    upper = f"{high:.0f}" if high <= lags[-1] else f"beyond {lags[-1]:.0f}"
    return (
        f"Half of the gain is lost about {estimate:.0f} steps after the exposure (power-law fit, "
        f"{percent(1 - alpha)} interval {low:.0f} to {upper} steps, units resampled)."
    )


def _half_life(lags: F64, gain: F64) -> float:
    """2^(1/b) times the first lag; infinity where the fitted gain does not fall."""
    from scipy.optimize import minimize_scalar

    relative = lags / lags[0]

    def misfit(b: float) -> float:
        shape = relative**-b
        scale = float(gain @ shape) / float(shape @ shape)
        return float(np.sum((gain - scale * shape) ** 2))

    b = float(minimize_scalar(misfit, bounds=(-1.0, 5.0), method="bounded").x)
    return float(lags[0] * 2 ** (1 / b)) if b > 1e-3 else math.inf
