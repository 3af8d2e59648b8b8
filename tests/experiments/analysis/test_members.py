"""One run measured on several members: one answer, at the member that was declared, and the rest
beside it.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from motet.experiments.analysis.analyze import analyze
from motet.experiments.analysis.measured import Measured
from motet.experiments.analysis.members import effects, secondaries
from motet.experiments.analysis.scores import read_probes
from motet.experiments.scoring.store import probe_path
from motet.experiments.stream.ledger import Segment, Stretch
from motet.experiments.types import ItemScores
from tests.experiments.analysis.test_analysis import CONTROLS, QUESTIONS, measured

DRAWS = 499


def on(member: str | None, entry: dict[str, Any], gain: float) -> Measured:
    """An experiment measured on one member, of which each doubling of the dose gains so much."""
    return replace(measured(entry, lambda n: gain * math.log2(1 + n)), member=member)


def judged_at(one: Measured, member: str | None) -> Measured:
    one.experiment.spec = replace(one.experiment.spec, member=member)
    return one


def family(entry: dict[str, Any], at: str | None, gains: dict[str | None, float]) -> list[Measured]:
    return [judged_at(on(member, entry, gain), at) for member, gain in gains.items()]


def test_the_answer_is_that_of_the_declared_member_alone() -> None:
    gains = {None: 2.5, "small": 0.0, "large": 2.0}
    whole, small = (
        analyze(family(QUESTIONS[0], at, gains), 0, DRAWS)["experiments"][0]
        for at in (None, "small")
    )
    alone = analyze([on(None, QUESTIONS[0], 2.5)], 0, DRAWS)["experiments"][0]
    assert whole["primary"] == alone["primary"]
    assert (whole["member"], whole["verdict"]["kind"]) == (None, "found")
    assert (small["member"], small["verdict"]["kind"]) == ("small", "not_found")
    assert "of the whole model is" in whole["verdict"]["sentence"]
    assert "of member small is" in small["verdict"]["sentence"]
    assert [other["member"] for other in small["members"]] == [None, "large"]
    assert [member for member, _ in effects(small)] == ["small", None, "large"]
    json.dumps(small, allow_nan=False)


def test_with_one_member_nothing_is_said_of_members() -> None:
    found = analyze([on(None, QUESTIONS[0], 1.0)], 0, DRAWS)["experiments"][0]
    assert not {"member", "members"} & set(found)
    assert "whole model" not in found["verdict"]["sentence"]
    assert effects(found) == []


def test_members_share_the_assignment_so_equal_scores_give_equal_estimates() -> None:
    found = analyze(family(QUESTIONS[0], None, {None: 1.0, "copy": 1.0}), 0, DRAWS)
    (entry,) = found["experiments"]
    (copy,) = entry["members"]
    for name in ("effect", "low", "high", "p", "n"):
        assert copy["primary"][name] == entry["primary"][name]


def test_holm_corrects_over_declared_members_only_and_the_rest_is_secondary() -> None:
    gains: dict[str | None, float] = {None: 0.4, "a": 0.3, "b": 0.2, "c": 0.1}
    alone = analyze([on(None, entry, 0.4) for entry in QUESTIONS[:2]], 0, DRAWS)
    many = analyze([one for entry in QUESTIONS[:2] for one in family(entry, None, gains)], 0, DRAWS)
    for one, other in zip(alone["experiments"], many["experiments"], strict=True):
        assert one["primary"]["p_corrected"] == other["primary"]["p_corrected"]
        assert one["primary"]["smallest_detectable"] == other["primary"]["smallest_detectable"]
    pool = [o for entry in many["experiments"] for o in secondaries(entry) if o["p"] is not None]
    n_own = sum(len(entry["secondary"]) for entry in alone["experiments"])
    assert len(pool) > n_own + 2 * 3 - 1  # at least the primary outcome of 3 more members, twice
    ordered = sorted(o["p"] for o in pool)
    by_hand = {
        p: min(q * len(ordered) / (i + 1) for i, q in enumerate(ordered) if q >= p) for p in ordered
    }
    for outcome in pool:
        assert outcome["p_corrected"] == pytest.approx(min(1.0, by_hand[outcome["p"]]))


def test_an_experiment_whose_own_member_was_not_measured_has_no_answer() -> None:
    found = analyze(
        [judged_at(on(None, QUESTIONS[0], 1.0), "small"), on(None, CONTROLS[0], 0.0)], 0, DRAWS
    )
    assert found["experiments"] == []
    assert found["controls"]["placebo"] is not None


def test_each_member_has_its_own_scores_in_a_probe_file(tmp_path: Path) -> None:
    arrays: dict[str, Any] = {}
    for key, logprob in (("canaries", -3.0), ("canaries@s", -5.0), ("quiz@s", -7.0)):
        arrays |= {
            f"{key}/logprob": np.array([logprob]),
            f"{key}/n_tokens": np.array([2]),
            f"{key}/n_bytes": np.array([9]),
            f"{key}/greedy": np.array([False]),
        }
    facts = json.dumps({"step": 4, "segment": 1, "definition_sha256": ""}).encode()
    np.savez(probe_path(tmp_path, 4), facts=np.frombuffer(facts, dtype=np.uint8), **arrays)
    stretches = [Stretch(Segment(1, 0, 1, 0, 1, "", ""), 0, 8)]

    def logprobs(member: str | None) -> dict[str, float]:
        found = read_probes(tmp_path, stretches, member)
        return {name: float(probed.scores[0].logprob[0]) for name, probed in found.items()}

    assert logprobs(None) == {"canaries": -3.0}
    assert logprobs("s") == {"canaries": -5.0, "quiz": -7.0}
    assert logprobs("other") == {}
    assert isinstance(read_probes(tmp_path, stretches)["canaries"].scores[0], ItemScores)
