"""Does the analysis claim what is not there? 1,000 simulated studies without any effect.

Every study holds the four built-in questions and the A/A control: real classes with invented units,
real assignment, real analysis; only the scores are simulated, with what real ones have - units of
very different difficulty, skewed noise, clusters of like units, blocks that differ, correlation
between steps, binary outcomes - and no dependence on the arm at all.

    python bench/validity_null.py [--studies 1000] [--json] [--plot null.png]

What must hold: the A/A control's p-values are uniform (its outcome is continuous;
Kolmogorov-Smirnov p > .01), each question's test rejects at most 5 % of the time, and any of the
four primaries survives Holm's correction in at most 5 % of studies. Outcomes with ties (accuracy,
rank) can only make p larger, so their rates may lie below 5 %; uniformity is not claimed for them.
For contrast, the t-test that ignores clusters and blocks is applied to the same scores.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import Measured
from motet.experiments.design.assignment import assign, assignment_key, make_design
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import ItemScores, Unit

ALPHA = 0.05
DRAWS = 999
STEPS_TOTAL = 1000
CLUSTER_SIZE = 3
ENTRIES: list[dict[str, Any]] = [
    {
        "name": "canaries",
        "use": "memorization",
        "generate": {"count": 32, "seed": 1},
        "doses": [0, 1, 4, 16],
        "options": {"n_references": 15},
    },
    {
        "name": "questions",
        "use": "contamination",
        "generate": {"count": 90, "seed": 1},
        "doses": [0, 4, 36],
    },
    {
        "name": "facts",
        "use": "knowledge",
        "generate": {"count": 48, "seed": 1},
        "schedule": {"kind": "every", "every": 50, "start": 100},
        "options": {"probes_per_kind": 2, "dense_probes": False},
    },
    {"name": "once", "use": "forgetting", "generate": {"count": 40, "seed": 1}},
    {"name": "nothing", "use": "placebo", "generate": {"count": 40, "seed": 1}},
]
CLUSTERED = ("questions", "facts")

Prepared = list[tuple[Experiment, list[Unit]]]


def prepare() -> Prepared:
    """The experiments and their units; some units are made clusters of three."""
    specs, problems = parse_experiments(ENTRIES, Path(), Library(Path()))
    assert not problems, problems
    prepared = []
    for spec in specs:
        experiment = LIBRARY[spec.use](spec)
        units = experiment.units()
        if spec.name in CLUSTERED:
            units = [
                replace(unit, cluster=f"cluster-{number // CLUSTER_SIZE}")
                for number, unit in enumerate(units)
            ]
        prepared.append((experiment, units))
    return prepared


def simulate(
    experiment: Experiment, units: list[Unit], seed: int, rng: np.random.Generator
) -> Measured:
    """One experiment of one study: real assignment, scores that do not know it."""
    spec = experiment.spec
    design = make_design(units, spec.arms)
    arms = assign(design, assignment_key(seed, spec.name))
    first = spec.schedule.first_step(STEPS_TOTAL)
    steps = np.array(sorted({0, first, first + 1, 600, STEPS_TOTAL}), dtype=np.int64)
    doses = np.array([arm.dose for arm in spec.arms], dtype=np.int64)[arms]
    planned = doses if experiment.inserts_units else np.zeros_like(doses)
    shown = [first + 50 * np.arange(n, dtype=np.int64) for n in planned]
    if spec.use == "memorization":
        shown = [np.sort(rng.integers(0, 900, size=n)) for n in planned]
    return Measured(
        experiment,
        units,
        arms,
        None,
        design,
        steps,
        null_scores(units, design.cluster_of_unit, design.block_of_cluster, len(steps), rng),
        planned,
        planned.copy(),
        shown,
    )


def null_scores(
    units: list[Unit],
    cluster_of_unit: np.ndarray,
    block_of_cluster: np.ndarray,
    n_steps: int,
    rng: np.random.Generator,
) -> list[ItemScores]:
    """Scores per step: block, cluster, unit and item difficulty that last, skewed noise that does
    not.
    """
    unit_I = np.repeat(np.arange(len(units)), [len(unit.items) for unit in units])
    cluster_I = cluster_of_unit[unit_I]
    n_tokens = rng.integers(3, 12, size=len(units))[unit_I]
    lasting = (
        rng.normal(0, 1.0, block_of_cluster.max() + 1)[block_of_cluster][cluster_I]
        + rng.normal(0, 1.0, len(block_of_cluster))[cluster_I]
        - rng.exponential(1.0, len(units))[unit_I]
        + rng.normal(0, 1.0, len(unit_I))
    )
    # Right answers share a part within a cluster, as near-duplicates do; wrong ones do not.
    right_I = np.array([item.kind != "wrong" for unit in units for item in unit.items])
    lasting = lasting + right_I * rng.normal(0, 1.5, len(block_of_cluster))[cluster_I]
    scores = []
    for step in range(n_steps):
        moving = 0.3 * step * rng.exponential(1.0, len(block_of_cluster))[cluster_I]
        noise = rng.gumbel(0, 0.7, len(unit_I)) + rng.normal(0, 0.5, len(units))[unit_I]
        logprob = 2.0 * lasting + moving + noise - 3.0 * n_tokens
        greedy = logprob > -3.0 * n_tokens + 2.0
        scores.append(ItemScores(logprob, n_tokens, 2 * n_tokens, greedy))
    return scores


def study(seed: int) -> dict[str, Any]:
    """p-values of one study."""
    rng = np.random.default_rng([20, seed])
    measured = [simulate(experiment, units, seed, rng) for experiment, units in PREPARED]
    answers = analyze(measured, seed, DRAWS, details=False)
    return {
        "primary": {e["name"]: e["primary"]["p"] for e in answers["experiments"]},
        "corrected": [e["primary"]["p_corrected"] for e in answers["experiments"]],
        "secondary": [
            (f"{e['name']}.{o['name']}", o["p"], o["p_corrected"])
            for e in answers["experiments"]
            for o in e["secondary"]
        ],
        "aa": answers["controls"]["placebo"]["primary"]["p"],
        "naive": naive_p(measured[1]),
    }


def naive_p(m: Measured) -> float:
    """What a t-test over units says about the questions' margin, blocks and clusters ignored."""
    from scipy.stats import ttest_ind

    margin = m.experiment.measure(m.units, m.scores[-1])["margin"]
    treated = np.array([arm.dose > 0 for arm in m.experiment.spec.arms])[m.arms]
    return float(ttest_ind(margin[treated], margin[~treated], equal_var=False).pvalue)


def rate(p_values: list[float]) -> dict[str, float]:
    """Share of p <= .05 with its exact 95 % binomial interval."""
    from scipy.stats import binomtest

    hits = int(np.sum(np.array(p_values) <= ALPHA))
    interval = binomtest(hits, len(p_values)).proportion_ci(0.95)
    return {"rate": hits / len(p_values), "low": float(interval.low), "high": float(interval.high)}


def summarize(studies: list[dict[str, Any]]) -> dict[str, Any]:
    """Every rate that the claim is about."""
    from scipy.stats import kstest

    aa = [s["aa"] for s in studies]
    # p lies on the grid 1/(n+1) ... 1; half a step down makes it comparable to a continuous law.
    centred = np.array(aa) - 0.5 / (DRAWS + 1)
    names = list(studies[0]["primary"])
    secondary: dict[str, list[float]] = {}
    for s in studies:
        for name, p, _ in s["secondary"]:
            if p is not None:
                secondary.setdefault(name, []).append(p)
    result: dict[str, Any] = {
        "studies": len(studies),
        "draws": DRAWS,
        "aa_ks_p": float(kstest(centred, "uniform").pvalue),
        "aa_rate": rate(aa),
        "primary_rates": {name: rate([s["primary"][name] for s in studies]) for name in names},
        "secondary_rates": {name: rate(values) for name, values in secondary.items()},
        "family_wise_rate": rate([min(s["corrected"]) for s in studies]),
        "any_secondary_after_bh": rate(
            [min(c for _, _, c in s["secondary"] if c is not None) for s in studies]
        ),
        "naive_t_test_rate": rate([s["naive"] for s in studies]),
    }
    nominal = [result["family_wise_rate"], *result["primary_rates"].values()]
    result["ok"] = result["aa_ks_p"] > 0.01 and all(r["low"] <= ALPHA for r in nominal)
    return result


def plot(studies: list[dict[str, Any]], path: str) -> None:
    """Empirical distribution of the p-values against the diagonal."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.5, 5))
    lines = {"A/A control": [s["aa"] for s in studies]}
    lines |= {name: [s["primary"][name] for s in studies] for name in studies[0]["primary"]}
    lines["t-test, clusters ignored"] = [s["naive"] for s in studies]
    for label, values in lines.items():
        style: dict[str, Any] = {"linestyle": ":", "color": "gray"} if "t-test" in label else {}
        axes.step(
            np.sort(values), np.arange(1, len(values) + 1) / len(values), label=label, **style
        )
    axes.plot([0, 1], [0, 1], color="black", linewidth=0.8)
    axes.set(xlabel="p-value", ylabel="share of studies at or below", title="No effect anywhere")
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


PREPARED: Prepared = []


def _start() -> None:
    PREPARED[:] = prepare()
    gc.freeze()  # statsmodels' multipletests collects garbage at every call: a fifth of the time


def run(n_studies: int, workers: int = 1) -> list[dict[str, Any]]:
    """All studies, in parallel when there is more than one worker."""
    if workers <= 1:
        _start()
        return [study(seed) for seed in range(n_studies)]
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_start) as pool:
        return pool.map(study, range(n_studies), chunksize=8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=min(4, multiprocessing.cpu_count()))
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    began = time.perf_counter()
    studies = run(options.studies, options.workers)
    result = summarize(studies)
    result["seconds"] = time.perf_counter() - began
    if options.plot:
        plot(studies, options.plot)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{result['studies']} studies without effect, {result['seconds']:.0f} s")
    print(f"A/A p-values: Kolmogorov-Smirnov p = {result['aa_ks_p']:.3f}")
    rows = {"A/A control": result["aa_rate"]} | result["primary_rates"]
    rows |= {"any primary, after Holm": result["family_wise_rate"]}
    rows |= {"any secondary, after BH": result["any_secondary_after_bh"]}
    rows |= {"t-test that ignores clusters": result["naive_t_test_rate"]}
    for name, share in rows.items():
        print(f"{name:32} {share['rate']:6.1%}  (95 % {share['low']:.1%} to {share['high']:.1%})")
    print("OK" if result["ok"] else "NOT OK")


if __name__ == "__main__":
    main()
