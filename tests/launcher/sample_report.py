"""A synthetic report.json with everything that a page must cope with: `python -m` free, seeded, no
training.

`sample()` gives a run with found, missing, negligible and invalid answers, hostile texts and long
names. `bare()` gives an unfinished run without experiments.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

HOSTILE = "<script>alert('x')</script> & \"quotes\" </style></svg><img src=x onerror=alert(1)>"
STEPS = 600


def outcome(
    name: str,
    label: str,
    unit: str,
    effect: float | None,
    half: float,
    p: float | None,
    n: int,
    **more: Any,
) -> dict[str, Any]:
    found = effect is not None
    control = more.pop("control", 1.0)
    return {
        "name": name, "label": label, "unit": unit, "contrast": more.pop("contrast",
                                                                         "any dose vs dose 0"),
        "effect": effect, "low": effect - half if found else None,
        "high": effect + half if found else None,
        "confidence": 0.95, "p": p, "p_corrected": more.pop("p_corrected",
                                                            None if p is None else min(1.0, 5 * p)),
        "control_mean": control, "treated_mean": control + effect if found else None, "n": n,
        "smallest_detectable": more.pop("detectable", 1.4 * half),
        "assumption": "units were assigned at random within blocks; no spill-over between clusters",
        "trend": more.pop("trend", None), "per_arm": [], **more,
    }  # fmt: skip


def negative_control(primary: dict[str, Any], ok: bool | None) -> dict[str, Any]:
    p = {True: 0.52, False: 0.0012, None: None}[ok]
    told = {
        True: "Before any exposure (step 0) the arms did not differ.",
        False: "Units that were to be shown already differed before anything was shown.",
        None: "There is none: no probe was made before the first exposure.",
    }[ok]
    return {
        "series": primary["name"], "label": primary["label"], "unit": primary["unit"], "step": 0,
        "adjusted": False, "contrast": primary["contrast"], "effect": 0.1, "low": -0.2, "high": 0.4,
        "p": p, "p_corrected": p, "tests": 1, "ok": ok, "sentence": told,
    }  # fmt: skip


def arms(doses: list[float], n: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    labels = names or ["control" if d == 0 else f"dose {d:g}" for d in doses]
    return [
        {"name": label, "dose": d, "n_units": n, "n_clusters": n, "planned_exposures": int(d * n),
         "consumed_exposures": int(d * n)}
        for label, d in zip(labels, doses, strict=True)
    ]  # fmt: skip


def curve(x: list[float], mean: list[float], half: float, **more: Any) -> dict[str, Any]:
    return {
        "x": x,
        "mean": mean,
        "low": [m - half for m in mean],
        "high": [m + half for m in mean],
        **more,
    }


def over_time(
    label: str, unit: str, starts: float, ends: dict[str, float], half: float, seed: int
) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    steps = list(range(0, STEPS + 1, 60))
    series = []
    for arm, end in ends.items():
        grown = [1 - math.exp(-3 * s / STEPS) for s in steps]
        mean = [starts + (end - starts) * g / grown[-1] + half * 0.2 * rng.normal() for g in grown]
        series.append({"arm": arm, "steps": steps, "mean": [float(m) for m in mean],
                       "low": [float(m - half) for m in mean],
                       "high": [float(m + half) for m in mean]})  # fmt: skip
    return {"outcome": label.replace("-", "_"), "label": label, "unit": unit, "series": series}


def entry(name: str, use: str, hypothesis: str, primary: dict[str, Any], kind: str, sentence: str,
          the_arms: list[dict[str, Any]], **more: Any) -> dict[str, Any]:  # fmt: skip
    n_units = sum(arm["n_units"] for arm in the_arms)
    for arm in the_arms:
        step = (primary["effect"] or 0.0) * math.log2(1 + arm["dose"]) / 4
        primary["per_arm"].append(
            {"arm": arm["name"], "dose": arm["dose"], "mean": primary["control_mean"] + step,
             "effect": None if arm["dose"] == 0 else step,
             "low": None if arm["dose"] == 0 else step - 0.1,
             "high": None if arm["dose"] == 0 else step + 0.1,
             "p": None if arm["dose"] == 0 else 0.01,
             "n": arm["n_units"]})  # fmt: skip
    return {
        "name": name, "use": use, "role": more.pop("role", "question"), "hypothesis": hypothesis,
        "protocol": more.pop("protocol",
                             "Seeded items, assigned to doses in blocks; scored by likelihood."),
        "n_units": n_units, "n_clusters": n_units, "n_blocks": 4, "arms": the_arms,
        "primary": primary,
        "secondary": more.pop("secondary", []),
        "negative_control": negative_control(primary, more.pop("alike", True)), "verdict": {"kind": kind, "sentence": sentence},
        "power": {"smallest_detectable": primary["smallest_detectable"], "unit": primary["unit"],
                  "standardized": 0.5, "power": 0.8, "alpha": 0.05,
                  "assumption": "normal approximation"},
        "curves": {"dose_response": None, "over_time": [],
                   "since_exposure": None} | more.pop("curves", {}),
        "examples": more.pop("examples", []), "notes": more.pop("notes", []), **more,
    }  # fmt: skip


def questions() -> list[dict[str, Any]]:
    doses = [0.0, 1.0, 4.0, 16.0]
    return [
        entry(
            "canaries", "memorization",
            "A secret that occurs more often in training is easier to extract from the model.",
            outcome("exposure", "exposure", "bits", 4.31, 0.92, 0.0001, 64, control=1.62,
                    trend={"slope_per_doubling": 1.02, "low": 0.8, "high": 1.24, "p": 0.0001}),
            "found",
            "Secrets shown during training became 4.3 bits easier to extract than unseen ones.",
            arms(doses, 16),
            protocol="Random secrets in a fixed sentence, 1 to 16 insertions; exposure is log2 of "
                     "the candidates minus log2 of the rank (Carlini et al. 2019).",
            secondary=[
                outcome("extracted", "extracted greedily", "probability", 0.21, 0.11, 0.002, 64,
                        control=0.0,
                        p_corrected=0.006),
                outcome("log_probability", "log-probability", "nats/token", 1.37, 0.4, 0.0001, 64,
                        control=-4.2, p_corrected=0.0003),
            ],
            curves={
                "dose_response": curve(doses, [1.62, 2.9, 5.1, 8.7], 0.9, n=[16] * 4,
                                       label="exposure", unit="bits"),
                "over_time": [
                    over_time("exposure", "bits", 1.5,
                              {"control": 1.6, "dose 1": 2.9, "dose 4": 5.1, "dose 16": 8.7}, 0.8,
                              1),
                    over_time("log-probability", "nats/token", -5.5,
                              {"control": -4.2, "dose 1": -3.9, "dose 4": -3.1, "dose 16": -1.9},
                              0.3, 2),
                ],
            },
            examples=[
                {"unit": "canary-0007", "arm": "dose 16",
                 "text": "The access number of Mira Tolvanen is 481 920 337."},
                {"unit": "canary-0031", "arm": "control",
                 "text": "The access number of Jon Abreu is 120 664 918."},
            ],
        ),
        entry(
            "invented-mcq", "contamination",
            "Having seen a multiple-choice question with its answer raises accuracy on that "
            "question.",
            outcome("accuracy", "accuracy", "accuracy", 0.192, 0.081, 0.0004, 400, control=0.26,
                    trend={"slope_per_doubling": 0.041, "low": 0.02, "high": 0.06, "p": 0.001}),
            "found", "Contaminated questions were answered right 19 percentage points more often.",
            arms([0.0, 4.0, 12.0, 36.0], 100),
            curves={
                "dose_response": curve([0.0, 4.0, 12.0, 36.0], [0.26, 0.31, 0.42, 0.61], 0.08,
                                       n=[100] * 4, label="accuracy", unit="accuracy"),
                "over_time": [over_time("accuracy", "accuracy", 0.25,
                              {"control": 0.26, "dose 4": 0.31, "dose 12": 0.42, "dose 36": 0.61},
                              0.07, 3)],
            },
            examples=[{"unit": "q-12", "arm": "dose 4", "text": HOSTILE}],
            notes=["Questions with a near duplicate were assigned together: 400 questions, 391 "
                   "clusters."],
        ),
        entry(
            "fictional-facts", "knowledge",
            "Paraphrases of a fact are retained better than verbatim repetitions of it, at equal "
            "dose.",
            outcome("semantic", "log-probability of the fact asked in other words", "nats/token",
                    0.084, 0.21,
                    0.41, 90, control=-3.9, contrast="paraphrase vs duplicate", p_corrected=0.82),
            "not_found", "No difference was detected; with 90 facts only effects above 0.29 "
                         "nats/token would be.",
            arms([0.0, 1.0, 10.0, 10.0], 30, ["control", "once", "duplicate", "paraphrase"]),
            curves={
                "dose_response": curve([0.0, 1.0, 10.0, 10.0], [-3.9, -3.7, -3.1, -3.02], 0.2,
                                       n=[30] * 4, names=["control", "once", "duplicate",
                                                          "paraphrase"],
                                       label="semantic log-probability", unit="nats/token"),
                "over_time": [
                    over_time(name, "nats/token", -5.2, {"control": -3.9 + 0.1 * i, "once": -3.7,
                              "duplicate": -3.1, "paraphrase": -3.0 + 0.1 * i}, 0.2, 4 + i)
                    for i, name in enumerate(("memorization", "semantic", "compositional"))
                ],
            },
            examples=[{"unit": "fact-3", "arm": "paraphrase",
                       "text": "Das Königreich Ÿmra prägt seit 1482 Münzen aus Glas — "
                               "王国は硝子の硬貨を鋳造する 🪙."}],
        ),
        entry(
            "one-glance", "forgetting",
            "What is seen once is forgotten within a few hundred steps.",
            outcome("retained", "loss reduction left at the end", "nats/token", 0.004, 0.019, 0.67,
                    48,
                    control=0.0, p_corrected=0.82, detectable=0.027),
            "negligible", "What is left of one exposure lies within the margin of 0.05 nats/token.",
            arms([0.0, 1.0], 24),
            curves={
                "since_exposure": curve([1, 2, 4, 8, 16, 32, 64, 128, 256],
                                        [0.52, 0.44, 0.35, 0.24, 0.17, 0.1, 0.06, 0.03, 0.01], 0.06,
                                        label="loss reduction", unit="nats/token"),
                "over_time": [over_time("loss of the text", "nats/token", 5.5,
                                        {"control": 4.02, "dose 1": 4.0}, 0.1, 9)],
            },
        ),
        entry(
            "a-name-as-long-as-a-name-may-be-when-a-careful-person-writes-it",
            "memorization",
            "This hypothesis is long because its author explains the background in full: " + HOSTILE
            + " and then goes on for a while about why rare tokens at the end of a canary may or "
              "may not "
            "make it easier to remember, citing earlier work, before coming to the point.",
            outcome("exposure",
                    "exposure of canaries with a rare suffix, relative to reference candidates",
                    "bits", -0.4, 1.1, 0.47, 32, control=2.0, p_corrected=0.94),
            "not_found", "Not detected. " + HOSTILE,
            arms([0.0, 2.0], 16),
            curves={"over_time": [over_time("exposure", "bits", 1.0, {"control": 2.0,
                                                                      "dose 2": 1.6}, 1.0, 11)]},
            examples=[{"unit": HOSTILE, "arm": "dose 2",
                       "text": HOSTILE + "\n\tsecond line " + "long " * 120}],
            notes=[HOSTILE],
        ),
        entry(
            "broken-items", "contamination",
            "Answers that are wrong on purpose lower accuracy.",
            outcome("accuracy", "accuracy", "accuracy", None, 0.0, None, 20, detectable=None),
            "invalid",
            "No answer: 7 of 40 planned exposures were not consumed, so arms are not as assigned.",
            arms([0.0, 4.0], 10),
            notes=["Exposure compliance below 100 %: see Exposure compliance."],
        ),
    ]  # fmt: skip


def controls() -> dict[str, Any]:
    placebo = entry(
        "placebo", "placebo", "Units that differ by name alone do not differ (A/A).",
        outcome("log_probability", "log-probability", "nats/token", 0.011, 0.09, 0.8, 64,
                control=-4.1,
                p_corrected=None),
        "not_found", "No effect, as it must be.", arms([0.0, 0.0], 32, ["A", "B"]), role="placebo",
    )  # fmt: skip
    positive = entry(
        "positive_control", "positive_control", "A text shown very often is memorized.",
        outcome("log_probability", "log-probability", "nats/token", 3.2, 0.3, 0.0001, 16,
                control=-4.3,
                p_corrected=None),
        "found", "Found, as it must be.", arms([0.0, 32.0], 8), role="positive_control",
    )  # fmt: skip
    return {
        "placebo": placebo | {"ok": True,
                              "sentence": "The A/A placebo compared 64 units that were treated "
                              "alike and found no difference (p = 0.80), as it must."},
        "positive": positive | {"ok": True,
                                "sentence": "The positive control was found (+3.2 nats/token, "
                                "p = 0.0001): this run can detect an effect that is there."},
    }  # fmt: skip


def ledger_row(name: str, planned: int, placebos: int, missing: int = 0) -> dict[str, Any]:
    return {
        "name": name, "planned": planned, "planned_placebo": placebos,
        "consumed_once": planned - missing,
        "consumed_once_placebo": placebos, "missing": missing, "duplicated": 0, "not_applied": 0,
    }  # fmt: skip


def training(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    steps = np.arange(1, STEPS + 1)
    loss = 3.9 + 3.4 * np.exp(-steps / 90) + 0.06 * rng.normal(size=STEPS)
    exposures = {
        "canaries": sorted(int(s) for s in rng.integers(1, 540, 330)),
        "invented-mcq": sorted(int(s) for s in rng.integers(1, 540, 5200)),
        "fictional-facts": [s for s in range(60, 540, 48) for _ in range(21)],
        "one-glance": [180] * 24,
        questions()[4]["name"]: sorted(int(s) for s in rng.integers(300, 540, 32)),
        "placebo": sorted(int(s) for s in rng.integers(1, 540, 64)),
        "positive_control": sorted(int(s) for s in rng.integers(1, 540, 256)),
    }
    return {
        "steps": steps.tolist(), "loss": loss.tolist(), "lr": [1e-3] * STEPS,
        "grad_norm": [1.0] * STEPS,
        "tokens_per_s": [41_000.0] * STEPS, "exposure_steps": exposures,
        "seconds": {"train": 212.0, "probe": 21.5, "checkpoint": 3.1, "data": 1.4},
        "skipped_steps": [233],
    }  # fmt: skip


def sample(first_line: str | None = None) -> dict[str, Any]:
    """The full sample; `first_line` is the notice of a changed definition."""
    return {
        "version": 1,
        "first_line": first_line,
        "damaged": [],
        "standing": {"kind": "judged", "step": 600, "judged_at": {}},
        "run": {
            "name": "stdlib-demo", "created": "2026-03-01T10:00:00Z",
            "finished": "2026-03-01T10:04:12Z",
            "steps": STEPS, "tokens": 9_830_400, "parameters": 1_212_416,
            "model": {"preset": "1m", "n_layers": 4, "d_model": 128, "n_heads": 4,
                      "vocabulary_size": 2048},
            "data": [{"path": "corpora/stdlib", "fingerprint": "ab" * 32, "tokens": 8_412_331,
                      "documents": 1_702, "weight": 1.0}],
            "sequence_length": 512, "batch": 32, "world_size": 2, "precision": "fp32",
            "definition_sha256": "0f" * 32, "plan_sha256": "1e" * 32, "motet_version": "0.1.0",
            "config_yaml": "name: stdlib-demo\nseed: 0\nmodel:\n  preset: 1m\n# " + HOSTILE + "\n",
            "attempts": [
                {"attempt": 1, "start_step": 0, "end_step": 400, "reason": "SIGTERM",
                 "world_size": 2},
                {"attempt": 2, "start_step": 400, "end_step": 600, "reason": "finished",
                 "world_size": 1},
            ],
        },
        "answers": {
            "alpha": 0.05, "draws": 10_000, "experiments": questions(), "controls": controls(),
            "multiplicity": {"primaries": "Holm", "secondaries": "Benjamini-Hochberg"},
        },
        "compliance": {
            "planned": 5933, "consumed_once": 5926, "missing": 7, "duplicated": 0,
            "skipped_updates": 1,
            "per_experiment": [
                ledger_row("canaries", 336, 112),
                ledger_row("invented-mcq", 5200, 400),
                ledger_row("broken-items", 40, 0, missing=7),
            ],
            "ledger_ok": False,
            "problems": ["broken-items: 7 exposures fell on the skipped step 233"],
        },
        "training": training(),
        "cost": {"wall_s": 251.0, "tokens": 9_830_400, "tokens_per_s": 41_200.0, "flops": 8.9e13,
                 "mfu": None, "experiment_tokens": 214_000, "experiment_share": 0.0218,
                 "probe_share": 0.09,
                 "prediction": "step 0.5 s measured, 0.48 s predicted (0.4 to 0.6)"},
        "definition": {"version": 1, "seed": 0, "steps_total": STEPS, "experiments": [
            {"spec": {"name": "canaries", "dose_in": "exposures", "hypothesis": HOSTILE},
             "tokens": 9000,
             "probe_steps": list(range(0, STEPS + 1, 60))}]},
        "hashes": {"definition_sha256": "0f" * 32, "plan_sha256": "1e" * 32,
                   "lock_sha256": "2d" * 32},
    }  # fmt: skip


def bare() -> dict[str, Any]:
    """A run that has just begun: no experiment, no ledger, no step."""
    full = sample()
    full["run"] |= {"finished": None, "steps": 0, "tokens": 0, "attempts": [], "world_size": None,
                    "definition_sha256": None, "plan_sha256": None, "data": []}  # fmt: skip
    return full | {
        "answers": {"alpha": 0.05, "draws": 0, "experiments": [], "multiplicity": {},
                    "controls": {"placebo": None, "positive": None}},
        "compliance": {"planned": 0, "consumed_once": 0, "missing": 0, "duplicated": 0,
                       "skipped_updates": 0,
                       "per_experiment": [], "ledger_ok": None, "problems": []},
        "training": {"steps": [], "loss": [], "lr": [], "grad_norm": [], "tokens_per_s": [],
                     "exposure_steps": {}, "seconds": {}, "skipped_steps": []},
        "cost": {"wall_s": None, "tokens": 0, "tokens_per_s": None, "flops": None, "mfu": None,
                 "experiment_tokens": None, "experiment_share": None, "probe_share": None,
                 "prediction": ""},
        "definition": {}, "hashes": {},
    }  # fmt: skip


def small() -> dict[str, Any]:
    """The sample with its second question only (one hostile example) and no control."""
    report = sample()
    report["answers"] |= {
        "experiments": questions()[1:2],
        "controls": {"placebo": None, "positive": None},
    }
    report["training"]["exposure_steps"] = {"invented-mcq": [1, 5, 9]}
    return report


def family() -> dict[str, Any]:
    """The sample as a run of three members: answers at the small one, and at the whole model."""
    report = sample()
    report["run"]["members"] = [
        {"name": name, "parameters": size, "parameters_non_embedding": size // 2,
         "flops_per_token": 6.0 * size} for name, size in (("small", 210_000), ("medium", 520_000))
    ]  # fmt: skip
    canaries, quiz = report["answers"]["experiments"][:2]

    def at(member: str | None, effect: float) -> dict[str, Any]:
        exposure = outcome("exposure", "exposure", "bits", effect, 0.9, 0.002, 64)
        extracted = outcome("extracted", "extracted greedily", "probability", 0.1, 0.1, 0.2, 64)
        return {"member": member, "primary": exposure, "secondary": [extracted]}

    canaries |= {"member": "small", "members": [at(None, 5.2), at("medium", 4.8)]}
    quiz |= {"member": None, "members": [
        {"member": "small", "primary": outcome("accuracy", "accuracy", "accuracy", None, 0, None, 0),
         "secondary": []}]}  # fmt: skip
    return report
