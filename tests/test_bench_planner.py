"""`bench/planner.py` on tables of made-up runs."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[1] / "bench" / "planner.py"
KEYS = ("n", "mape", "spearman", "kendall", "regret_mfu_points", "first_choice_fits")
KEYS += ("oom_accuracy", "false_fit_rate")
GPT = {
    "model": "GPT-x", "hidden": 2048, "ffn_hidden": 8192, "layers": 24, "heads": 16, "seq_len": 2048, "gpus": 16,
    "gpus_per_node": 8, "global_batch": 64, "micro_batch": 2, "tp": 2, "pp": 2, "dp": 4, "step_time_s": 2.5,
    "set": "multi", "framework": "Megatron",
}  # fmt: skip
STAGES = {
    "model": "GPT-2 24L", "set": "mixed", "gpu_type": "3x g4dn.12xlarge + 1x p3.8xlarge", "gpus": 16, "hidden": 1024,
    "layers": 24, "seq_len": 1024, "partition": "0 12 30", "stage_sizes": "12 18", "global_batch": 32,
    "micro_batch": 2, "tp": 1, "pp": 2, "dp": 8, "step_time_s": 2.0, "status": "ok",
}  # fmt: skip


def table(path: Path, *rows: dict[str, object]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def planner(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCH), *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def test_every_group_has_every_score_and_none_is_made_up(tmp_path: Path) -> None:
    rows = table(tmp_path / "mixed.csv", STAGES, STAGES | {"set": "alone", "status": "failed"})
    done = planner("--rows", rows, "--json")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)["groups"]
    assert set(groups) == {"mixed.csv/mixed/GPT-2 24L", "mixed.csv/alone/GPT-2 24L"}
    for scored in groups.values():
        assert set(KEYS) <= set(scored)
    one = groups["mixed.csv/mixed/GPT-2 24L"]
    assert one["n"] == 1
    assert one["mape"] > 0
    assert one["spearman"] is None
    none = groups["mixed.csv/alone/GPT-2 24L"]
    assert none["n"] == 0
    assert none["mape"] is None
    assert none["oom_accuracy"] in (0.0, 1.0)


def test_rows_that_could_not_run_are_told_and_the_others_scored(tmp_path: Path) -> None:
    odd = [{"dp": 64}, {"pp": 64, "dp": 1, "tp": 1}, {"act_ckpt": "sometimes"}, {"tp": 4, "dp": 2}]
    rows = table(tmp_path / "gpt.csv", *(GPT | {"act_ckpt": "every_layer"} | more for more in odd))
    done = planner("--rows", rows)
    assert done.returncode == 0, done.stderr
    assert "3 rows left out: line 2: tp, pp, dp and cp need 256 devices, it has 16" in done.stderr
    assert "act_ckpt='sometimes' is none of disabled" in done.stderr
    assert "gpt.csv/16 A100 multi/GPT-h2048: n=1 " in done.stdout


def test_a_table_of_another_kind_is_refused_by_its_columns(tmp_path: Path) -> None:
    done = planner("--rows", table(tmp_path / "other.csv", {"a": 1, "b": 2}))
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "other.csv has columns of no known table; known are: attn_kernel" in done.stderr
