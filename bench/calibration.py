"""Are the p-values of a run's questions right on the scores of the model that it trained?

    python bench/calibration.py RUN [RUN ...] [--nulls 500] [--draws 999] [--results FILE] [--json]

For every question (and control) of a run folder, from its probe files, nothing trained again:

* *Null*: the units keep the scores that the trained model gave them, and arms are dealt anew,
  `--nulls` times, with keys of their own. Such arms have nothing to do with the scores, so p of the
  declared test of the primary outcome is at most .05 in 5 % of them. Held to by a two-sided
  binomial test at 1 %. A rate that is too low is told apart: designs of few units have coarse
  p-values.
* *Planted*: values of units in the contrast's control group are drawn anew for all units, with
  their value before exposure; the smallest detectable effect, as the report would print it for this
  question alone, is added to those that are dealt a dose (shares: that many zeros become ones; where
  a range has an end, shifted values stop there, and the shift is as large as the mean effect
  needs). At least 75 % must be found at .05, by a one-sided binomial test at 1 %.

Questions whose test is a trend or an omnibus have no planted part. Rows that a results file holds
for the same scores are not computed again, so that a stopped calibration goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.analysis.answers import Answer
from motet.experiments.analysis.declared import group_scores, primary_of
from motet.experiments.analysis.measured import Measured
from motet.experiments.design.assignment import assign
from motet.experiments.design.declared import declared_test
from motet.experiments.stream.random import name_key
from motet.experiments.types import OutcomeSpec
from motet.launcher.study.after_training import load_measured

F64 = npt.NDArray[np.float64]
ALPHA = 0.05
EDGE = 0.01
"""Of the binomial test on the number of false alarms."""
FEWEST_FOUND = 0.75


def calibrate(m: Measured, nulls: int, draws: int, seed: int = 0) -> dict[str, Any]:
    """How often nothing is found where something was not, and a planted effect where it was.

    Args:
        m: an experiment after training.
        nulls: assignments that are dealt anew, for either part.
        draws: repeated assignments of each test.
        seed: of all of it.
    """
    primary = primary_of(m.experiment)
    study = Answer(m, seed, draws, 1, simulations=None)
    values, covariate = study.values(primary), study.baseline(primary)
    p = [
        _p(again, primary, values, covariate)
        for again in _dealt_anew(m, nulls, draws, seed, "null")
    ]
    row = {"experiment": m.name, "use": m.experiment.spec.use, "outcome": primary.name}
    row |= {"units": len(m.units), **null_row(p)}
    if declared_test(m.experiment, primary) != "contrast":
        return row | {"detectable": None, "power": None, "why": "no contrast, nothing planted"}
    found = study.declared(primary, values, covariate)
    untouched = group_scores(m.experiment, primary)[m.arms] == 0
    size = study.detectable(primary, values, covariate, found).size
    if size is None:
        return row | {"detectable": None, "power": None, "why": "no possible effect is detectable"}
    hits = [
        _p(again, primary, *planted(again, primary, values, covariate, untouched, size, number))
        <= ALPHA
        for number, again in enumerate(_dealt_anew(m, nulls, draws, seed, "planted"))
    ]
    return row | {"detectable": size, "power": float(np.mean(hits)), "found_enough": enough(hits)}


def enough(hits: Sequence[bool]) -> bool:
    """Whether at least `FEWEST_FOUND` are found, give or take what the number of studies leaves
    open.
    """
    from scipy.stats import binomtest

    found = int(np.sum(hits))
    return float(binomtest(found, len(hits), FEWEST_FOUND, "less").pvalue) > EDGE


def _dealt_anew(m: Measured, count: int, draws: int, seed: int, what: str) -> Iterator[Answer]:
    """The same scores under other arms, each with repetitions of its own."""
    for number in range(count):
        key = name_key(seed, "calibration", what, m.name, number)
        yield Answer(replace(m, arms=assign(m.design, key)), key, draws, 1)


def _p(study: Answer, primary: OutcomeSpec, values: F64, covariate: F64 | None) -> float:
    found = study.declared(primary, values, covariate)
    return float(found.p) if found.answered else 1.0


def null_row(p: Sequence[float]) -> dict[str, Any]:
    """Rate of false alarms, and whether it is that of a sound test."""
    from scipy.stats import binomtest

    alarms = int(np.sum(np.array(p) <= ALPHA))
    test = float(binomtest(alarms, len(p), ALPHA).pvalue)
    low = test <= EDGE and alarms < ALPHA * len(p)
    return {
        "nulls": len(p),
        "rate": alarms / len(p),
        "binomial_p": test,
        "sound": test > EDGE or low,
        "coarse": low,
    }


def planted(
    study: Answer,
    primary: OutcomeSpec,
    values: F64,
    covariate: F64 | None,
    untouched: npt.NDArray[np.bool_],
    size: float,
    number: int,
) -> tuple[F64, F64 | None]:
    """Values without effect for every unit, drawn from those that were `untouched` in training, and
    an effect of `size` on those that this assignment treats; float64 [U] each.
    """
    rng = np.random.Generator(np.random.Philox(key=name_key("planted", study.spec.name, number)))
    scores = group_scores(study.m.experiment, primary)
    drawn = rng.choice(np.flatnonzero(untouched & np.isfinite(values)), len(values))
    base = values[drawn].copy()
    treated = scores[study.m.arms] == 1
    base[treated] = raised(base[treated], size, primary, rng)
    return base, None if covariate is None else covariate[drawn]


def raised(base: F64, size: float, outcome: OutcomeSpec, rng: np.random.Generator) -> F64:
    """Values whose expected mean is `size` higher, in the outcome's possible range."""
    if outcome.binary:
        zeros = 1 - base.mean()
        flips = rng.random(len(base)) < min(1.0, size / zeros) if zeros > 0 else False
        return np.where((base < 0.5) & flips, 1.0, base)
    _, high = outcome.range
    if high is None:
        return base + size
    least, most = 0.0, high - float(base.min(initial=high))
    for _ in range(60):  # the mean rises with the shift
        middle = (least + most) / 2
        mean = float(np.minimum(base + middle, high).mean() - base.mean())
        least, most = (middle, most) if mean < size else (least, middle)
    return np.minimum(base + most, high)


def rows_of(
    runs: Sequence[Path], nulls: int, draws: int, results: Path | None
) -> Iterator[dict[str, Any]]:
    """One row per question of every run; those that a results file holds are read from it."""
    done: dict[str, dict[str, Any]] = {}
    if results and results.exists():
        lines = results.read_text(encoding="utf-8").splitlines()
        done = {row["key"]: row for row in map(json.loads, lines)}
    for run in runs:
        for m in load_measured(run).measured:
            key = sha256_hex(
                canonical_json([run.name, m.name, m.member or "", nulls, draws, _scores_of(m)])
            )[:16]
            if key not in done:
                done[key] = {"key": key, "run": run.name, **calibrate(m, nulls, draws)}
                if results:
                    with results.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(done[key]) + "\n")
            yield done[key]


def _scores_of(m: Measured) -> str:
    """A hash of the last scores."""
    return sha256_hex(np.ascontiguousarray(m.scores[-1].logprob).tobytes())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--nulls", type=int, default=500)
    parser.add_argument("--draws", type=int, default=999)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for row in rows_of(arguments.runs, arguments.nulls, arguments.draws, arguments.results):
        rows.append(row)
        said = row.get("why") or f"{row['power']:.0%} of {row['detectable']:.3g} found"
        told = "coarse" if row["coarse"] else "sound" if row["sound"] else "NOT SOUND"
        line = f"{row['experiment']:24} {row['outcome']:20} {row['rate']:6.1%} {told:10} {said}"
        print(line, file=sys.stderr if arguments.json else sys.stdout)
    ok = all(row["sound"] and row.get("found_enough", True) for row in rows)
    if arguments.json:
        print(json.dumps({"ok": ok, "rows": rows}))
    raise SystemExit(0 if ok else 1)


if __name__ == "__main__":
    main()
