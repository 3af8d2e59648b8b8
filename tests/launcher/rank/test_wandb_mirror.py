"""The mirror to Weights & Biases, read back from the `.wandb` files that it writes offline."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from motet.launcher.rank.mirrored_rows import history_of
from motet.launcher.rank.wandb_mirror import (
    MirrorSettings,
    WandbMirror,
    has_credentials,
    model_facts_of,
    stored_run_id,
    without_secrets,
)
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir

BLOCK = 32 * 1024
HEADER = 7
SECRET = "planted-secret-5d41402abc4b"

ATTEMPT = """
import sys
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from motet.launcher.rank.wandb_mirror import open_mirror
root, start = sys.argv[1], int(sys.argv[2])
config = {"name": "r", "training": {"steps": 8}, "leak": "planted-secret-5d41402abc4b",
          "hub_token": "abc", "data": {"eod_token": 3, "batch_tokens": 7},
          "metrics": {"wandb": "offline", "project": "p", "group": "g", "tags": ["a", "b"]}}
rundir = RunDir(root)
mirror = open_mirror(rundir, config, facts={"definition_sha256": "d" * 64, "plan_sha256": "e" * 64})
with MetricsWriter(rundir, config, mirror=mirror) as metrics:
    metrics.log("attempt", start, start_step=start, attempt=1 + (start > 0))
    for step in range(start + 1, start + 5):
        metrics.log("step", step, loss=3.0 / step, tokens=512 * step, seconds={"data": 0.1},
                    skipped=step == 3)
    metrics.log("evaluation", start + 4, losses={"whole": 2.0, "small": 2.5}, unseen=True,
                latency_ms={"whole": 9.0, "small": 4.0}, sizes={"whole": 50, "small": 20})
    metrics.log("probe", start + 4, experiments={"canaries": {"rank/dose 16": 0.25}}, seconds=1.0)
mirror.table("units", ["unit", "score"], [["u1", 0.5]], step=start + 4)
mirror.alert("Training has stalled", "no step for 900 s")
mirror.summary({"answers/canaries/effect": 1.25})
mirror.close()
print(mirror.run_id, mirror.failure)
"""


def records(path: Path) -> Iterator[Any]:
    """Protobuf records of a `.wandb` file: LevelDB log, 7-byte headers, 32 KiB blocks, CRC
    checked.
    """
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    position, parts = HEADER, b""  # the file begins with a 7-byte identification
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        crc, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            position += left
            continue
        body = data[position + HEADER : position + HEADER + length]
        assert crc == zlib.crc32(body, zlib.crc32(bytes([kind]))) & 0xFFFFFFFF
        parts += body
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = []
    for record in found:
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items})
    return rows


def of_type(found: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


@pytest.fixture(scope="module")
def two_attempts(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[str], list[list[Any]]]:
    """Two processes, one run folder: steps 1-4, then 5-8, with secrets in environment and
    arguments.
    """
    pytest.importorskip("wandb")
    root = tmp_path_factory.mktemp("runs") / "tallis"
    environment = {**os.environ, "MY_API_KEY": SECRET, "WANDB_API_KEY": SECRET * 2}
    printed = []
    for start in ("0", "4"):
        done = subprocess.run(
            [sys.executable, "-c", ATTEMPT, str(root), start, f"--api-key={SECRET}"],
            env=environment, capture_output=True, text=True, check=True, timeout=120,
        )  # fmt: skip
        printed.append(done.stdout.strip())
    files = sorted((root / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    return root, printed, [list(records(path)) for path in files]


def test_two_attempts_are_one_run_whose_steps_have_no_gap(two_attempts: Any) -> None:
    root, printed, files = two_attempts
    run_id = (root / "wandb_id").read_text().strip()
    assert printed == [f"{run_id} None"] * 2
    assert [of_type(found, "run")[0].run_id for found in files] == [run_id, run_id]
    steps = [row["step"] for found in files for row in history(found) if "train/loss" in row]
    assert steps == list(range(1, 9))


KILLED = """
import os, sys, time
from motet.launcher.runs.metrics import MetricsWriter, unmirrored
from motet.launcher.runs.rundir import RunDir
from motet.launcher.rank.wandb_mirror import open_mirror
rundir, start, stop = RunDir(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
config = {"metrics": {"wandb": "offline"}}
mirror = open_mirror(rundir, config)
metrics = MetricsWriter(rundir, config, mirror=mirror)
for row in unmirrored(rundir.metrics, start):
    mirror.log(row)
metrics.log("attempt", start, start_step=start)
for step in range(start + 1, stop + 1):
    metrics.log("step", step, loss=1.0)
if stop < 30:
    os._exit(9)  # nothing that only the mirror knows is on the disk
metrics.close()
mirror.close()
"""


def test_steps_that_a_killed_attempt_did_not_send_are_sent_by_the_next(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    root = tmp_path / "r"
    for start, stop in ((0, 25), (20, 30)):
        subprocess.run([sys.executable, "-c", KILLED, str(root), str(start), str(stop)], timeout=60)
    files = sorted((root / "wandb").glob("offline-run-*/*.wandb"), key=os.path.getmtime)
    sent = [
        {row["step"] for row in history(list(records(path))) if "train/loss" in row}
        for path in files
    ]
    assert set().union(*sent) == set(range(1, 31))
    assert len(sent) < 2 or len(sent[0]) < 25, "else this test proves nothing"


def test_config_holds_settings_and_hashes_but_no_secret(two_attempts: Any) -> None:
    _, _, files = two_attempts
    run = of_type(files[0], "run")[0]
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    assert config["training"] == {"steps": 8}
    assert config["definition_sha256"] == "d" * 64
    assert config["plan_sha256"] == "e" * 64
    assert config["leak"] == config["hub_token"] == "(redacted)"
    assert config["data"] == {"eod_token": 3, "batch_tokens": 7}


def test_group_tags_job_type_and_name_are_set(two_attempts: Any) -> None:
    run = of_type(two_attempts[2][0], "run")[0]
    assert (run.project, run.run_group, list(run.tags)) == ("p", "g", ["a", "b"])
    assert (run.job_type, run.display_name) == ("train", "tallis")


def test_metrics_are_drawn_against_steps_and_tokens(two_attempts: Any) -> None:
    metrics = {m.name or m.glob_name: m for m in of_type(two_attempts[2][0], "metric")}
    assert metrics["*"].step_metric == "step"
    assert metrics["by_tokens/*"].step_metric == "tokens"
    assert metrics["train/loss"].summary.min
    row = next(r for r in history(two_attempts[2][0]) if r.get("step") == 2)
    assert (row["train/loss"], row["by_tokens/loss"], row["tokens"]) == (1.5, 1.5, 1024)
    assert row["train/seconds/data"] == 0.1


def test_probes_tables_alerts_and_summary_arrive(two_attempts: Any) -> None:
    root, _, files = two_attempts
    found = files[0]
    assert any(row.get("probe/canaries/rank/dose 16") == 0.25 for row in history(found))
    tables = sorted(p.name for p in (root / "wandb").glob("*/files/media/table/*.json"))
    assert any(name.startswith("units") for name in tables)
    assert any(name.startswith("probes") for name in tables)
    assert [a.title for a in of_type(found, "alert")] == ["Bad step", "Training has stalled"]
    summary = {
        i.key or "/".join(i.nested_key): i.value_json
        for s in of_type(found, "summary")
        for i in s.update
    }
    assert any("answers/canaries/effect" in key for key in summary), summary


def test_a_secret_in_environment_or_arguments_is_nowhere_under_the_run(two_attempts: Any) -> None:
    root = two_attempts[0]
    files = [path for path in root.rglob("*") if path.is_file()]
    assert len(files) > 5
    holders = [path for path in files if SECRET.encode() in path.read_bytes()]
    assert holders == []
    assert (root / "wandb").stat().st_mode & 0o077 == 0


def test_a_dead_endpoint_neither_slows_nor_stops_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    said: list[str] = []
    settings = MirrorSettings(mode="online", init_timeout_s=2.0, finish_timeout_s=15.0)
    rundir = RunDir(tmp_path / "r")
    begin = time.perf_counter()
    mirror = WandbMirror(rundir, {}, settings, say=said.append)
    with MetricsWriter(rundir, {}, mirror=mirror) as metrics:
        assert time.perf_counter() - begin < 0.5
        slowest = 0.0
        for step in range(500):
            begin = time.perf_counter()
            metrics.log("step", step, loss=1.0)
            slowest = max(slowest, time.perf_counter() - begin)
    assert slowest < 0.5
    begin = time.perf_counter()
    mirror.close()
    assert time.perf_counter() - begin < 40
    assert len(said) == 1
    assert "offline" in said[0]


def test_a_failing_wandb_is_told_once_and_then_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    said: list[str] = []
    mirror = WandbMirror(
        RunDir(tmp_path / "r"), {}, MirrorSettings(mode="offline"), say=said.append
    )
    mirror.close()
    for step in range(3):
        mirror.log({"kind": "step", "step": step, "loss": 1.0})
    mirror.close()
    assert len(said) == 1
    assert "Training goes on" in said[0]


def test_wandb_is_not_imported_unless_asked(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from motet.launcher.runs.rundir import RunDir\n"
        "from motet.launcher.rank.wandb_mirror import open_mirror\n"
        "for mode in ('off', False, None):\n"
        "    assert open_mirror(RunDir(sys.argv[1]), {'metrics': {'wandb': mode}}) is None\n"
        "assert open_mirror(RunDir(sys.argv[1]), {'metrics': {'wandb': 'online'}}, rank=1) is "
        "None\n"
        "assert 'wandb' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_the_run_id_is_made_once(tmp_path: Path) -> None:
    rundir = RunDir(tmp_path)
    assert stored_run_id(rundir) == stored_run_id(rundir)
    (tmp_path / "wandb_id").write_text("../escape\n")
    assert stored_run_id(rundir) != "../escape"


def test_secrets_are_dropped_by_name_and_by_value() -> None:
    config = {
        "password": "x",
        "api_key": "y",
        "tokens": 5,
        "url": f"a {SECRET} b",
        "list": [SECRET],
    }
    assert without_secrets(config, frozenset({SECRET})) == {
        "password": "(redacted)", "api_key": "(redacted)", "tokens": 5,
        "url": "(redacted)", "list": ["(redacted)"],
    }  # fmt: skip


def test_a_member_of_a_family_has_keys_of_its_own_beside_the_whole_models() -> None:
    row = {"kind": "probe", "step": 3, "time": 1.0, "seconds": 2.0}
    row |= {"experiments": {"canaries": {"exposure/dose 4": 2.5}}}
    alone = {"step": 3, "probe/canaries/exposure/dose 4": 2.5, "probe_cost/seconds": 2.0}
    assert history_of(row) == alone
    row |= {"members": {"small": {"canaries": {"exposure/dose 4": 1.5}}}}
    assert history_of(row) == alone | {"probe/canaries@small/exposure/dose 4": 1.5}


def test_an_evaluation_shows_the_loss_of_each_member_over_time() -> None:
    row = {"kind": "evaluation", "step": 4, "time": 1.0, "losses": {"small": 2.5}, "unseen": True}
    assert history_of(row) == {"step": 4, "members/small/loss": 2.5, "evaluation/unseen": 1}
    row |= {"latency_ms": {"small": 7.0}, "sizes": {"small": 900}}
    assert history_of(row)["members/small/latency_ms"] == 7.0


def test_history_of_a_step_leaves_out_nulls() -> None:
    row = {
        "kind": "step",
        "step": 3,
        "time": 0.0,
        "loss": None,
        "skipped": True,
        "tokens": 9,
        "why": "x",
    }
    assert history_of(row) == {"step": 3, "tokens": 9, "train/skipped": 1}


def test_without_an_api_key_the_run_is_recorded_offline_and_nobody_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    said: list[str] = []
    settings = MirrorSettings(mode="online", init_timeout_s=5.0, finish_timeout_s=3.0)
    mirror = WandbMirror(RunDir(tmp_path / "r"), {}, settings, say=said.append)
    mirror.log({"kind": "step", "step": 1, "loss": 2.0})
    mirror.close()
    assert len(said) == 1
    assert "WANDB_API_KEY" in said[0]
    assert list((tmp_path / "r").glob("wandb/offline-run-*/*.wandb"))


def test_a_key_in_netrc_counts_as_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_IDENTITY_TOKEN_FILE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "netrc").write_text("machine api.example.org login user password k\n")
    assert has_credentials("https://api.example.org")
    assert not has_credentials("https://other.example.org")


def test_the_configuration_holds_the_model_that_is_trained_and_its_parameters() -> None:
    manifest = {"model": {"d_model": 8}, "parameters": 100, "parameters_non_embedding": 60}
    assert model_facts_of(manifest) == {
        "resolved_model": {"d_model": 8}, "parameters": 100, "parameters_non_embedding": 60,
    }  # fmt: skip
    assert model_facts_of({"model": None, "parameters": None}) == {}


def test_the_group_is_the_run_unless_another_is_given(tmp_path: Path) -> None:
    asked: dict[str, Any] = {}
    wandb = SimpleNamespace(
        init=lambda **given: asked.update(given), Settings=lambda **given: SimpleNamespace(**given)
    )
    for given, group in ((None, "tallis"), ("g", "g")):
        mirror = object.__new__(WandbMirror)
        mirror.settings = MirrorSettings(mode="offline", group=given)
        mirror.run_id, mirror._name, mirror._folder, mirror._config = "i", "tallis", "f", {}
        mirror._init(wandb, "offline")
        assert asked["group"] == group
