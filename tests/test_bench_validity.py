"""`bench/validity.py` and `bench/validity_null.py`: what they conclude, from made-up numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
# Shared minus alone in the three seeds that were once called "12 of 12 agree".
THREE_SEEDS = {
    "canaries": [0.49, 0.64, -0.04],
    "questions": [0.042, -0.192, -0.006],
    "facts": [0.02, 0.01, -0.11],
    "one_look": [-0.004, -0.002, -0.002],
}


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


def test_three_seeds_do_not_show_that_answers_agree() -> None:
    from validity import MARGINS, equivalence, pairs_needed

    found = {name: equivalence(values, MARGINS[name]) for name, values in THREE_SEEDS.items()}
    for name in ("canaries", "questions", "facts"):
        assert found[name]["verdict"] == "not shown"
        assert pairs_needed(found[name]["sd"], MARGINS[name]) > 3
    assert found["one_look"]["verdict"] == "equivalent"


def test_a_shift_beyond_the_margin_is_a_difference_and_a_small_one_is_not() -> None:
    from validity import equivalence

    noise = np.random.default_rng(0).normal(0, 0.1, 20)
    noise -= noise.mean()
    assert equivalence(list(noise), 0.1)["verdict"] == "equivalent"
    assert equivalence(list(noise + 0.2), 0.1)["verdict"] == "different"
    assert equivalence(list(noise + 0.09), 0.1)["verdict"] == "different"
    assert equivalence(list(noise * 10), 0.1)["verdict"] == "not shown"
    # Surely there, surely too small to matter.
    assert equivalence(list(noise + 0.05), 0.2)["verdict"] == "equivalent"


def test_the_test_is_that_of_two_one_sided_t_tests() -> None:
    from scipy.stats import ttest_1samp
    from validity import equivalence

    values = np.random.default_rng(1).normal(0.02, 0.1, 9)
    found = equivalence(list(values), 0.1)
    lower = ttest_1samp(values, -0.1, alternative="greater").pvalue
    upper = ttest_1samp(values, 0.1, alternative="less").pvalue
    assert found["p"] == pytest.approx(max(lower, upper))
    assert (found["p"] < 0.05) == (found["verdict"] == "equivalent")


def test_so_many_pairs_as_are_said_to_be_needed_find_equivalence_in_four_of_five_tests() -> None:
    from validity import equivalence, pairs_needed

    pairs = pairs_needed(0.3, 0.2)
    assert pairs is not None
    rng = np.random.default_rng(2)

    def shown(mean: float) -> float:
        samples = rng.normal(mean, 0.3, (500, pairs))
        return float(
            np.mean([equivalence(list(s), 0.2)["verdict"] == "equivalent" for s in samples])
        )

    assert 0.75 < shown(0.0) < 0.88
    assert shown(0.2) < 0.05 + 0.03
    assert pairs_needed(0.3, 0.0) is None


def made_up(effect: float, low: float, verdict: str) -> dict[str, Any]:
    bounds = {"effect": effect, "low": low, "high": 2 * effect - low, "p": 0.5}
    return {"name": "n", "unit": "u", "verdict": verdict} | bounds


def test_trainings_in_the_results_file_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import validity

    results, trained = tmp_path / "results.jsonl", []

    def train(folder: Path, corpus: Path, seed: int, names: list[str], steps: int) -> Any:
        trained.append((seed, validity.arm_of(names)))
        if len(trained) == 4:
            raise RuntimeError("the machine went away")
        shared = len(names) > 1
        return {
            name: made_up(
                1.0 + 0.1 * shared * (seed + 0.5), -0.1 if shared and seed else 0.1, "found"
            )
            for name in names
        }

    monkeypatch.setattr(validity, "train", train)
    monkeypatch.setattr(validity, "motet", lambda *words: "")
    with pytest.raises(RuntimeError, match="went away"):
        validity.trainings(2, 240, 1, results)
    found = validity.trainings(2, 240, 1, results)
    assert len(trained) == 11
    assert len(set(trained)) == 10
    assert validity.trainings(2, 240, 1, results) == found
    assert len(trained) == 11
    tests = validity.judged(validity.pairs_of(found, 2))
    assert [test["interval_flips"] for test in tests.values()] == [1] * 4
    assert [test["verdict_flips"] for test in tests.values()] == [0] * 4
    assert tests["facts"]["mean"] == pytest.approx(0.1)
    validity.trainings(1, 100, 1, results)  # made with other settings: none of them counts
    assert len(trained) == 16


@pytest.mark.parametrize("name", ["shares_4_controls", "bits_8_controls", "nats_16_and_16"])
def test_a_simulated_outcome_is_what_the_experiment_measures(name: str) -> None:
    import small_designs

    measured, truth = small_designs.simulate(name, 0, effects=True)
    experiment, steps = measured.experiment, measured.steps
    series = [experiment.measure(measured.units, scores) for scores in measured.scores]
    stacked = {key: np.array([row[key] for row in series]) for key in series[0]}
    final = experiment.summarize(
        measured.units, measured.arms, steps, stacked, measured.exposure_steps
    )
    outcome = next(outcome.name for outcome in experiment.outcomes if outcome.primary)
    design = small_designs.DESIGNS[name]
    index = list(small_designs.DESIGNS).index(name)
    rng = np.random.default_rng([12, 0, True, index])
    clusters = measured.design.cluster_of_unit
    _, without, exposed = small_designs.potential(design, clusters, True, rng)
    intended = np.where(measured.planned > 0, exposed, without)
    assert final[outcome] == pytest.approx(intended, abs=1e-9)
    assert truth == pytest.approx((exposed - without).mean())
    assert truth == pytest.approx(small_designs.effect_anew(name), abs=0.5)


def test_studies_in_the_results_file_are_not_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import small_designs
    import validity_null

    results = tmp_path / "studies.jsonl"
    found = validity_null.run(2, 1, 99, ("nothing",), results)
    assert len(results.read_text().splitlines()) == 2
    monkeypatch.setattr(validity_null, "one", lambda job, draws: pytest.fail("done again"))
    assert validity_null.run(2, 1, 99, ("nothing",), results) == found
    table = small_designs.summarize(found["nothing"], False)
    assert set(small_designs.DESIGNS) < set(table)
    json.dumps(table, allow_nan=False)
    with pytest.raises(pytest.fail.Exception):  # other draws: other studies
        validity_null.run(2, 1, 199, ("nothing",), results)


def test_rates_above_the_level_are_told_from_chance() -> None:
    from validity_null import none_above

    def rate(hits: int) -> dict[str, float]:
        return {"rate": hits / 1000, "n": 1000}

    assert none_above([rate(50)] * 20)
    assert none_above([rate(64), *[rate(40)] * 19])  # .064 happens by chance among 20
    assert not none_above([rate(80), *[rate(40)] * 19])
    assert none_above([])
    json.dumps(none_above([rate(50)]))  # `--json` prints it


def test_studies_of_small_designs_judge_whole_runs_and_their_control() -> None:
    import small_designs

    row = {"p": 0.5, "p_corrected": 0.5, "negative_control": True, "effect": 0.0}
    sound = {"one": row, "two": row | {"p_corrected": None}, "aa": row | {"control_ok": True}}
    found = small_designs.whole_runs(
        [
            sound,
            sound | {"two": row | {"p_corrected": 0.04}},
            sound | {"one": row | {"negative_control": False}},
            # An A/A of which something is found is no question.
            sound | {"aa": row | {"p": 0.001, "p_corrected": 0.001, "control_ok": False}},
        ]
    )
    assert found["any primary, after Holm"]["rejected"]["rate"] == 0.25
    assert found["any negative control fails"]["some_invalid"]["rate"] == 0.25
    assert found["the A/A control fails"]["invalid"]["rate"] == 0.25
    assert found["... or its negative control"]["void"]["rate"] == 0.25
    study = small_designs.study(0, effects=True, draws=99)
    assert set(study) == set(small_designs.DESIGNS)
    assert study["aa_5_and_5"]["truth"] == 0.0
    assert study["bits_4_controls"]["truth"] > 0.2


def test_p_values_of_trained_controls_are_kept_and_held_against_uniformity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import placebo_trained

    trained: list[int] = []

    def train(seed: int, further: int, corpus: Path) -> dict[str, float]:
        trained.append(seed)
        return {placebo_trained.CONTROL: (seed + 0.5) / 20, "aa-1": 0.01}

    monkeypatch.setattr(placebo_trained, "train", train)
    monkeypatch.setattr(placebo_trained, "motet", lambda *words: "")
    results = tmp_path / "results.jsonl"
    found = placebo_trained.trainings(20, 1, results)
    assert placebo_trained.trainings(20, 1, results) == found
    assert trained == list(range(20))
    judged = placebo_trained.judged(found)
    assert judged["controls"]["ks_p"] > 0.9
    assert judged["all"]["ks_p"] < 0.01
    assert not judged["ok"]
    text = placebo_trained.settings(7, 2, Path("/corpora/x"))
    assert "seed: 7\n" in text
    assert "{name: aa-2, use: placebo, doses: [0, 1]}" in text


def test_the_published_trainings_are_those_of_the_settings_that_the_bench_has() -> None:
    import validity

    rows = [json.loads(line) for line in validity.KEPT.read_text().splitlines()]
    assert {row["settings"] for row in rows} == {validity.settings_hash(80)}
    assert len(rows) == 8 * 5
