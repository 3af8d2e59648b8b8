"""Experiments that do more than insert text, in one small run: trained, audited, reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from motet.experiments.scoring.store import read_probe
from tests.system.runs import motet, write_yaml

pytestmark = pytest.mark.xdist_group("treatments")
MARK = "{name: mark, use: embedding_watermark, doses: [0, 6], generate: {count: 16}}"

META = "{name: meta, use: metadata, generate: {count: 24}}"
REPEAT = "repeat: {share: 0.25, sequences: 5, mixed: batch, drawn: replacement}"


def with_treatments(text: str) -> str:
    text = text.replace("processes: 2", "processes: 1").replace("steps: 24", "steps: 40")
    text = text.replace("sequence_length: 320", f"{REPEAT}, sequence_length: 320")
    first = text.index("    - {name: canaries")
    last = text.index("    - {name: aa")
    return f"{text[:first]}    - {MARK}\n    - {META}\n{text[last:]}"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    yaml = write_yaml(tmp_path_factory.mktemp("treatments"), corpus, "treated", with_treatments)
    refused = motet("experiments", "check", str(yaml), "layout.processes=2", "layout.pp=2")
    assert refused.returncode == 2
    assert "experiments.mark.use: adds noise to input embeddings; layout.pp=2" in refused.stderr
    done = motet("train", str(yaml))
    assert done.returncode == 0, done.stdout + done.stderr
    return yaml.parent / "runs" / "treated"


def test_a_run_with_noise_prefixes_and_repetition_is_proved_and_answered(trained: Path) -> None:
    done = motet("experiments", "audit", str(trained), "--replay")
    assert done.returncode == 0, done.stdout + done.stderr
    _, scores = read_probe(trained / "probes" / "step-00000040.npz")
    alignment = scores["mark"].alignment
    assert alignment is not None
    assert len(alignment) == 16
    assert np.isfinite(alignment).all()
    units = [json.loads(line) for line in (trained / "plan" / "units" / "mark.jsonl").open()]
    shown = np.array([unit["arm"] != "dose-0" for unit in units])
    assert alignment[shown].mean() > alignment[~shown].mean() + 0.02  # .06 of a deviation of .02
    assert scores["aa"].alignment is None
    done = motet("report", str(trained))
    assert done.returncode == 0, done.stdout + done.stderr
    answers = json.loads((trained / "report.json").read_text())
    assert "cosine of the noise" in json.dumps(answers)
    assert "log-probability with the prefix less that without" in json.dumps(answers)
    (told,) = [line for line in answers["compliance"]["warnings"] if "data.repeat" in line]
    assert (
        "is a global treatment: 25.00% of the sequences are 5 of them, each read about 16" in told
    )
    assert "one arm a run, no p-value" in told
