"""Does the analysis claim what is not there? 1,000 simulated studies without any effect.

    python bench/validity_null.py [--designs default] [--studies 1000] [--json] [--plot null.png]

`--designs default`: every study holds the four built-in questions and the A/A control: real classes with invented units,
real assignment, real analysis; only the scores are simulated, with what real ones have - units of
very different difficulty, skewed noise, clusters of like units, blocks that differ, correlation
between steps, binary outcomes - and no dependence on the arm at all. `--designs small`: every study
holds those of `small_designs.py`, once without an effect and, for the coverage of intervals, once
with effects that are known. `--designs all`: both. With `--results FILE` every study that ends is a
line of that file, and is not done again unless the analysis has changed since.

What must hold, of default and of small designs alike: each question's test and the A/A control's
rejects at most 5 % of the time, any primary survives Holm's correction in at most 5 % of studies,
and neither the A/A control nor a question's negative control fails more than 1 % of the time; one
or the other of the A/A's own two, which take the run's answers with them, at most 2 %.
Outcomes with ties (accuracy, rank) can only make p larger, so their rates may lie below 5 %. The
default A/A control, whose outcome is continuous, has uniform p-values (Kolmogorov-Smirnov p > .01).
"At most" is judged by exact binomial tests, one for every rate, together at 5 % (Bonferroni).
For contrast, the t-test that ignores clusters and blocks is applied to the same scores.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import small_designs

from motet.core.hashing import sha256_hex
from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import PLACEBO_THRESHOLD, Measured
from motet.experiments.analysis.negative import NEGATIVE_THRESHOLD
from motet.experiments.design.assignment import assign, assignment_key, make_design
from motet.experiments.design.experiment import Experiment
from motet.experiments.design.frozen import judging_sha256
from motet.experiments.design.parser import parse_experiments
from motet.experiments.library.kinds import LIBRARY, Library
from motet.experiments.types import ItemScores, Unit

ALPHA = 0.05
DRAWS = 999
NOT_UNIFORM = 0.01
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


def study(seed: int, draws: int = DRAWS) -> dict[str, Any]:
    """p-values of one study."""
    rng = np.random.default_rng([20, seed])
    measured = [simulate(experiment, units, seed, rng) for experiment, units in PREPARED]
    answers = analyze(measured, seed, draws, details=False, simulations=0)
    return {
        "primary": {e["name"]: e["primary"]["p"] for e in answers["experiments"]},
        "corrected": [e["primary"]["p_corrected"] for e in answers["experiments"]],
        "secondary": [
            (f"{e['name']}.{o['name']}", o["p"], o["p_corrected"])
            for e in answers["experiments"]
            for o in e["secondary"]
        ],
        "negative": [e["negative_control"]["ok"] is not False for e in answers["experiments"]],
        "aa": answers["controls"]["placebo"]["primary"]["p"],
        "aa_ok": answers["controls"]["placebo"]["ok"],
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
    found = small_designs.share_of([p <= ALPHA for p in p_values])
    assert found is not None
    return found


def none_above(rates: list[dict[str, float]], level: float = ALPHA) -> bool:
    """Whether all rates agree with at most `level`: exact binomial tests, Bonferroni's correction."""
    from scipy.stats import binomtest

    hits = [(round(r["rate"] * r["n"]), int(r["n"])) for r in rates]
    values = [binomtest(k, n, level, alternative="greater").pvalue for k, n in hits]
    return not values or bool(min(values) * len(values) > ALPHA)


def summarize(studies: list[dict[str, Any]], draws: int = DRAWS) -> dict[str, Any]:
    """Every rate that the claim is about."""
    aa = [s["aa"] for s in studies]
    names = list(studies[0]["primary"])
    secondary: dict[str, list[float]] = {}
    for s in studies:
        for name, p, _ in s["secondary"]:
            if p is not None:
                secondary.setdefault(name, []).append(p)
    result: dict[str, Any] = {
        "studies": len(studies),
        "draws": draws,
        "aa_ks_p": uniformity(aa, draws),
        "aa_rate": rate(aa),
        "aa_fails": small_designs.share_of([p < PLACEBO_THRESHOLD for p in aa]),
        "aa_void": small_designs.share_of([not s["aa_ok"] for s in studies]),
        "primary_rates": {name: rate([s["primary"][name] for s in studies]) for name in names},
        "secondary_rates": {name: rate(values) for name, values in secondary.items()},
        "family_wise_rate": rate([min(s["corrected"]) for s in studies]),
        "any_secondary_after_bh": rate(
            [min(c for _, _, c in s["secondary"] if c is not None) for s in studies]
        ),
        "negative_control_rate": small_designs.share_of(
            [not ok for s in studies for ok in s["negative"]]
        ),
        "naive_t_test_rate": rate([s["naive"] for s in studies]),
    }
    nominal = [result["family_wise_rate"], result["aa_rate"], *result["primary_rates"].values()]
    unsound = [result["aa_fails"], result["negative_control_rate"]]
    result["ok"] = (
        result["aa_ks_p"] > NOT_UNIFORM
        and none_above(nominal)
        and none_above(unsound, NEGATIVE_THRESHOLD)
        and none_above([result["aa_void"]], PLACEBO_THRESHOLD + NEGATIVE_THRESHOLD)
    )
    return result


def uniformity(p_values: list[float], draws: int) -> float:
    """Kolmogorov-Smirnov p of p-values that lie on the grid 1/(n+1) ... 1; half a step down makes
    them comparable to a continuous law.
    """
    from scipy.stats import kstest

    centred = np.array(p_values) - 0.5 / (draws + 1)
    return float(kstest(centred, "uniform").pvalue)


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
Job = tuple[str, int]
"""(condition, seed): "default"; "nothing" or "effects" for small designs."""


def _start() -> None:
    PREPARED[:] = prepare()
    small_designs.prepared()
    gc.freeze()  # statsmodels' multipletests collects garbage at every call: a fifth of the time


def one(job: Job, draws: int) -> tuple[Job, dict[str, Any]]:
    """One study."""
    condition, seed = job
    if condition == "default":
        return job, study(seed, draws)
    return job, small_designs.study(seed, condition == "effects", draws)


def made_with(draws: int) -> str:
    """What a kept study must have been made with to count: these studies, and the analysis with all
    that it rests on.
    """
    files = (Path(__file__), Path(small_designs.__file__))
    text = "".join(path.read_text(encoding="utf-8") for path in files)
    return sha256_hex(f"{text}{judging_sha256()}{draws}")[:12]


def run(
    n_studies: int,
    workers: int = 1,
    draws: int = DRAWS,
    conditions: Iterable[str] = ("default",),
    results: Path | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """All studies of each condition, in parallel when there is more than one worker."""
    jobs = [(condition, seed) for condition in conditions for seed in range(n_studies)]
    key, done = made_with(draws), {}
    if results and results.exists():
        for row in map(json.loads, results.read_text().splitlines()):
            if row["made_with"] == key:
                done[row["condition"], row["seed"]] = row["study"]
    missing = [job for job in jobs if job not in done]
    began = time.monotonic()
    for ended, (job, found) in enumerate(_each(partial(one, draws=draws), missing, workers), 1):
        done[job] = found
        if results:
            row = {"made_with": key, "condition": job[0], "seed": job[1], "study": found}
            with results.open("a") as file:
                file.write(json.dumps(row) + "\n")
        if ended % 50 == 0:
            spent = time.monotonic() - began
            print(f"{ended} of {len(missing)} studies, {spent:.0f} s", file=sys.stderr)
    return {c: [done[c, seed] for seed in range(n_studies)] for c in conditions}


def _each(work: Any, jobs: list[Job], workers: int) -> Iterable[tuple[Job, dict[str, Any]]]:
    """What `work` makes of every job, as it ends."""
    if workers <= 1:
        if jobs:
            _start()
        yield from map(work, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(workers, initializer=_start) as pool:
        yield from pool.imap_unordered(work, jobs, chunksize=4)


def show(result: dict[str, Any]) -> None:
    """Print what was found for the default designs."""
    print(f"A/A p-values: Kolmogorov-Smirnov p = {result['aa_ks_p']:.3f}")
    rows = {"A/A control": result["aa_rate"]} | result["primary_rates"]
    rows |= {"any primary, after Holm": result["family_wise_rate"]}
    rows |= {"any secondary, after BH": result["any_secondary_after_bh"]}
    rows |= {"A/A control fails (.01)": result["aa_fails"]}
    rows |= {"... or its negative control": result["aa_void"]}
    rows |= {"negative control fails (.01)": result["negative_control_rate"]}
    rows |= {"t-test that ignores clusters": result["naive_t_test_rate"]}
    for name, share in rows.items():
        print(f"{name:32} {share['rate']:6.1%}  (95 % {share['low']:.1%} to {share['high']:.1%})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--designs", choices=("default", "small", "all"), default="default")
    parser.add_argument("--studies", type=int, default=1000)
    parser.add_argument("--draws", type=int, default=DRAWS)
    parser.add_argument("--workers", type=int, default=min(4, multiprocessing.cpu_count()))
    parser.add_argument("--results", type=Path, help="keep ended studies here, and go on from it")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--plot", default="")
    options = parser.parse_args()
    began = time.perf_counter()
    small = ("nothing", "effects")
    conditions = {"default": ("default",), "small": small, "all": ("default", *small)}
    studies = run(
        options.studies,
        options.workers,
        options.draws,
        conditions[options.designs],
        options.results,
    )
    result: dict[str, Any] = {"draws": options.draws}
    if "default" in studies:
        result |= summarize(studies["default"], options.draws)
        if options.plot:
            plot(studies["default"], options.plot)
    for condition in small:
        if condition in studies:
            result[condition] = small_designs.summarize(studies[condition], condition == "effects")
    void = PLACEBO_THRESHOLD + NEGATIVE_THRESHOLD
    levels = (("rejected", ALPHA), ("invalid", NEGATIVE_THRESHOLD), ("void", void))
    for name, level in levels:
        rates = [row.get(name) for row in result.get("nothing", {}).values()]
        good = none_above([rate for rate in rates if rate is not None], level)
        result["ok"] = result.get("ok", True) and good
    result["seconds"] = time.perf_counter() - began
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print(f"{options.studies} studies of each kind, {result['seconds']:.0f} s")
    if "default" in studies:
        show(result)
    for condition in small:
        if condition in studies:
            print(f"\nsmall designs, {condition}:")
            small_designs.show(result[condition], condition == "effects")
    print("OK" if result["ok"] else "NOT OK")


if __name__ == "__main__":
    main()
