"""`bench/progressive.py`: what is compared at one loss, what a family costs, and what is told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BENCH = Path(__file__).parents[1] / "bench"
GRID = (2e-3, 4e-3, 8e-3)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    import progressive

    return progressive


def cores(bench: Any) -> Any:
    return bench.SCALES["cores"]


def curve(flops: np.ndarray, loss: np.ndarray) -> list[list[float]]:
    return [[float(x), 0.0, float(y)] for x, y in zip(flops, loss, strict=True)]


def row(bench: Any, arm: str, seed: int, **more: Any) -> dict[str, Any]:
    return {
        **{"arm": arm, "seed": seed, "lr": GRID[0], "loss": 2.0, "cpu_s": 1.0},
        **{"settings": bench.fingerprint(cores(bench), arm, GRID[0]), **more},
    }


def test_a_speedup_is_the_flops_from_scratch_to_the_same_loss(bench: Any) -> None:
    flops = np.arange(1, 41) * 1e12
    scratch = row(bench, "scratch", 0, curve=curve(flops, 4.0 - np.log(flops / 1e12)))
    arm = row(bench, "gstack", 0, curve=curve(flops, 3.7 - np.log(flops / 1e12)), flops=20e12)
    arm["curve"] = arm["curve"][:20]
    found, below = bench.speedup(arm, scratch)
    assert found == pytest.approx(np.exp(0.3), rel=0.01)
    assert not below
    arm["curve"] = curve(flops[:20], 1.0 - np.log(flops[:20] / 1e12))
    found, below = bench.speedup(arm, scratch)
    assert below  # from scratch nothing came so low: the number is the least that it can be
    assert found == pytest.approx(2.0, rel=0.01)


def test_chance_in_single_measurements_hardly_moves_a_speedup(bench: Any) -> None:
    flops, draw = np.arange(1, 33) * 1e12, np.random.default_rng(0)
    found = []
    for _ in range(50):
        noise = draw.normal(0, 0.01, (2, len(flops)))
        level = 2.5 - 0.5 * np.log(flops / 1e12)
        scratch = row(bench, "scratch", 0, curve=curve(flops, level + noise[0]))
        arm = row(bench, "gstack", 0, curve=curve(flops[:20], (level + noise[1])[:20]))
        found.append(bench.speedup(arm | {"flops": 20e12}, scratch)[0])
    assert np.mean(found) == pytest.approx(1.0, abs=0.01)
    assert np.std(found) < 0.03


def test_a_family_costs_what_its_largest_member_costs_alone(bench: Any) -> None:
    arms = bench.arms
    scale = cores(bench)
    made = arms.family_of(scale, 0, 1e-3, arms.family_steps(scale))
    each = [arms.training_flops_per_token(one.config, scale.length) for one in made.stages]
    lengths = [made.stop_of(n) - made.starts[n] for n in range(len(each))]
    alone = [steps * cost for steps, cost in zip(arms.member_steps(scale), each, strict=True)]
    spent = np.cumsum([steps * cost for steps, cost in zip(lengths, each, strict=True)])
    assert spent == pytest.approx(alone, rel=0.02)  # each member too, up to whole steps
    assert spent[-1] / sum(alone) == pytest.approx(0.74, abs=0.01)
    assert [one.config.n_layers for one in made.stages] == [1, 2, 4, 8]


def test_sequences_of_an_epoch_come_once(bench: Any, tmp_path: Path) -> None:
    arms = bench.arms
    path = speeches(tmp_path)
    text = arms.Text(path, 0, cores(bench))
    steps = len(text.train) // text.scale.sequences
    rows = np.concatenate([text.batch(step).tokens_BT for step in range(steps)])
    assert len(np.unique(rows, axis=0)) == len(rows)
    arms._sequences.cache_clear()


def test_the_table_has_what_is_there_and_says_what_lacks(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flops = np.arange(1, 33) * 1e12
    rows = [row(bench, "tuning", bench.TUNING_SEED)]
    rows += [
        row(bench, "tuning", bench.TUNING_SEED, lr=lr, loss=3.0)
        | {"settings": bench.fingerprint(cores(bench), "tuning", lr)}
        for lr in GRID[1:]
    ]
    for seed in range(2):
        level = curve(flops, 3.0 - 0.5 * np.log(flops / 1e12))
        rows.append(row(bench, "scratch", seed, curve=level))
        rows.append(row(bench, "gstack", seed, curve=level[:16], flops=10e12 + 2e12 * seed))
        for arm, gap in (("family", 0.1), ("family-alone", 0.0)):
            told = {"members": {"whole": 2.0 - gap}, "member_flops": {"whole": 1.0}}
            rows.append(row(bench, arm, seed, **told, kl=[0.5 - gap], flops=0.75 + gap))
    rows.append(row(bench, "mango", 0, curve=level, flops=1.0) | {"settings": "of other settings"})
    kept = tmp_path / "kept.json"
    kept.write_text(json.dumps(rows))
    asked = ["progressive", "--summary", "--json", "--results", str(kept)]
    monkeypatch.setattr("sys.argv", asked)
    bench.main()
    said = capsys.readouterr()
    found = json.loads(said.out)
    (line,) = found["operators"]
    assert (line["operator"], line["seeds"]) == ("gstack", [0, 1])
    assert line["flops_speedup"] == pytest.approx((1.6 + 16 / 12) / 2, rel=0.01)
    low, high = line["interval"]
    assert low < line["flops_speedup"] < high
    assert found["family"]["kl"] == pytest.approx(0.4)
    assert found["family"]["kl_alone"] == pytest.approx(0.5)
    (member,) = found["family"]["members"]
    assert (member["member"], member["loss"], member["loss_alone"]) == ("whole", 1.9, 2.0)
    assert "mango, seed 0" in said.err
    assert "gstack, seed 2" in said.err
    assert "gstack, seed 1" not in said.err


def speeches(folder: Path) -> Path:
    draw = np.random.default_rng(0)
    lines = [json.dumps({"text": bytes(draw.integers(32, 127, 900)).decode()}) for _ in range(60)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    return folder / "t.jsonl"


def test_every_arm_of_the_gpu_script_trains_to_its_end(tmp_path: Path) -> None:
    """Tiny and on the CPU, from the shell; what was trained is not trained again."""
    kept = tmp_path / "kept.json"
    words = ["--tiny", "--text", str(speeches(tmp_path)), "--seeds", "1", "--results", str(kept)]
    script = [str(BENCH / "gpu_family.sh"), *words, "--json"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["lacking"]
    assert len(found["operators"]) == 10
    assert all(line["flops_speedup"] > 0 for line in found["operators"])
    assert [one["member"] for one in found["family"]["members"]][-1] == "whole"
    before = kept.read_text()
    again = subprocess.run(script, capture_output=True, text=True, env=environment, timeout=300)
    assert json.loads(again.stdout) == found
    assert kept.read_text() == before
