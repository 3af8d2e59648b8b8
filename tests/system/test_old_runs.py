"""Run folders of version 0.1.0 open in this one (see `kept_runs`)."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from motet.core.files import read_json
from motet.core.hashing import canonical_json, sha256_hex
from motet.experiments.design.frozen import freeze
from motet.launcher.config.run_yaml import load, public
from motet.launcher.report.places import without_places
from motet.launcher.study.before_training import build
from tests.kept_runs import unpack
from tests.system.runs import losses, motet, motet_here

EVERY_KIND = """
name: every
seed: 5
model: {preset: 1m, d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 1, d_ffn: 32, head_dim: 8}
data: {sequence_length: 640, corpora: [{path: corpus}]}
batch: {sequences: 16}
training: {steps: 60, schedule: {warmup_steps: 2}}
layout: {processes: 1, micro_sequences: 16}
experiments:
  controls: true
  list:
  - {name: canaries, use: memorization, doses: [0, 2], generate: {count: 12, seed: 1},
     options: {n_references: 7}}
  - {name: quiz, use: contamination, generate: {count: 8}}
  - {name: facts, use: knowledge, generate: {count: 6}, placement: anywhere,
     schedule: {every: 2, start: 1}}
  - {name: gone, use: forgetting, generate: {count: 8}, schedule: {kind: steps, at: [0.5]}}
"""


# How small an effect would have been found was a formula in 0.1.0, and is simulated.
SIMULATED_NOW = ("smallest_detectable", "power")
FORMULA = " An effect of "
OVERESTIMATED = " Likely overestimated"
WORDS = (
    ("or many units", "or more units than a handful in each group"),
    (
        "interval by Newcombe's method, because units do not differ within their group",
        "interval by Newcombe's method over blocks, as no unit differs within its group",
    ),
)
"""What 0.1.0 said in other words, or claimed and could not."""


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack(tmp_path_factory.mktemp("old"))


def held(now: float, then: float, where: str) -> bool:
    """Whether an end of a curve's interval was beyond what is possible, and stops there now: shares
    at 0 and 1, the exposure of a canary among 7 references at 0 and 3 bits.
    """
    if ".curves." not in where:
        return False
    return then < now == 0.0 if ".low[" in where else then > now and now in (1.0, 3.0)


def assert_same(now: Any, then: Any, where: str = "") -> None:
    """What was there is there still, numbers to ten digits; further keys may have come."""
    if isinstance(then, dict):
        assert isinstance(now, dict), where
        for key, value in then.items():
            assert key in now, f"{where}.{key} is gone"
            if key not in SIMULATED_NOW:
                assert_same(now[key], value, f"{where}.{key}")
    elif isinstance(then, list):
        assert isinstance(now, list), where
        assert len(now) == len(then), where
        for number, (a, b) in enumerate(zip(now, then, strict=True)):
            assert_same(a, b, f"{where}[{number}]")
    elif isinstance(then, float):
        assert now == pytest.approx(then, rel=1e-10, abs=1e-12) or held(now, then, where), where
    elif isinstance(then, str):
        for before, after in WORDS:
            then = then.replace(before, after)
        if where.startswith(".answers"):  # with the minus and percent signs of that time
            then = re.sub(r"(?<=\d)%", " %", re.sub(r"(?<!\S)-(?=\d)", "\u2212", then))
        said = now.split(OVERESTIMATED)[0].split(FORMULA)[0]
        assert said == then.split(FORMULA)[0], where
    else:
        assert now == then, where


def test_its_report_says_what_it_said(old: Path) -> None:
    run = old / "runs" / "finished"
    done = motet_here("report", str(run))
    assert done.returncode == 0, done.stderr
    now = json.loads((run / "report.json").read_text(encoding="utf-8"))
    then = json.loads((old / "report.json").read_text(encoding="utf-8"))
    assert_same(now, without_places(then, run))  # reports name no folder of the machine since


def test_its_audit_passes(old: Path) -> None:
    done = motet_here("experiments", "audit", str(old / "runs" / "finished"), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "audit passed" in done.stdout


def as_in_0_1_0(path: Path) -> str:
    """A definition without the keys that later versions added."""
    content = json.loads(path.read_text())
    content["analysis"].pop("alpha")
    content.pop("judged_by_sha256")
    for entry in content["experiments"]:
        assert entry.pop("judged_at_step") == content["steps_total"]
    return canonical_json(content)


def test_its_settings_are_frozen_to_the_bytes_that_they_were(old: Path, tmp_path: Path) -> None:
    run = old / "runs" / "finished"
    corpus = f"data.corpora.0.path={old / 'corpus'}"
    freeze(build(load(run / "run.yaml", [corpus])), tmp_path)
    then = (run / "plan" / "definition.json").read_text()
    assert as_in_0_1_0(tmp_path / "definition.json") == then
    now, before = (read_json(folder / "lock.json") for folder in (tmp_path, run / "plan"))
    assert now == before  # but for its hash, which it has since
    plan = "exposures.plan"
    assert (tmp_path / plan).read_bytes() == (run / "plan" / plan).read_bytes()


def test_every_built_in_experiment_is_frozen_with_the_hashes_of_0_1_0(
    old: Path, tmp_path: Path
) -> None:
    """The hashes are those that 0.1.0 gave to the same settings."""
    (tmp_path / "run.yaml").write_text(EVERY_KIND)
    corpus = f"data.corpora.0.path={old / 'corpus'}"
    found = freeze(build(load(tmp_path / "run.yaml", [corpus])), tmp_path / "plan")
    assert sha256_hex(as_in_0_1_0(tmp_path / "plan" / "definition.json")) == (
        "63e8b304666eb0cd10e12dd545eff743082bc86300b8e060fdeea4828bc9b8d5"
    )
    assert found.plan_sha256 == "29a90693ddb1f265547b55c0afbb0b11492c84e9cb3fb978a6ab79eba6b0b2be"


def test_its_model_is_exported_to_the_byte(old: Path, tmp_path: Path) -> None:
    done = motet_here("export", str(old / "runs" / "finished"), "--output", str(tmp_path / "hf"))
    assert done.returncode == 0, done.stderr
    weights = (tmp_path / "hf" / "model.safetensors").read_bytes()
    expected = json.loads((old / "expected.json").read_text(encoding="utf-8"))
    assert hashlib.sha256(weights).hexdigest() == expected["exported_sha256"]


def test_it_is_seen_by_status_and_inspected(old: Path) -> None:
    status = motet_here("status", "--runs", str(old / "runs"), "--json")
    assert status.returncode == 0, status.stderr
    shown = {row["name"]: row for row in json.loads(status.stdout)["runs"]}
    assert shown.keys() == {"finished", "stopped"}
    seen = motet_here("data", "inspect", str(old / "runs" / "finished"), "--slot", "0")
    assert seen.returncode == 0, seen.stderr


def test_settings_that_came_later_are_left_out_of_what_its_own_code_reads(old: Path) -> None:
    """A run is trained by its snapshot of the code, which refuses a setting it does not know."""
    path = old / "runs" / "stopped" / "resolved.yaml"
    known, now = yaml.safe_load(path.read_text(encoding="utf-8")), public(load(path))
    later = {
        f"{section}.{key}"
        for section, inner in now.items()
        if isinstance(inner, dict)
        for key in inner.keys() - known.get(section, {}).keys()
    }
    assert now.keys() <= known.keys()
    assert not later


def test_it_goes_on_where_it_stopped_and_ends_as_it_would_have(old: Path) -> None:
    run = old / "runs" / "stopped"
    done = motet("resume", str(run))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (run / "DONE").exists()
    expected = json.loads((old / "expected.json").read_text(encoding="utf-8"))["losses"]
    found = losses(run)
    assert list(found) == list(range(1, 121))
    assert list(found.values()) == pytest.approx(expected, rel=1e-5)
    audit = motet_here("experiments", "audit", str(run), "--replay")
    assert audit.returncode == 0, audit.stdout + audit.stderr
    report = motet_here("report", str(run))
    assert report.returncode == 0, report.stderr
