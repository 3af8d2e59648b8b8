"""Trackers beside Weights & Biases, with a stand-in for each package, and alerts to a local
server.
"""

from __future__ import annotations

import http.server
import json
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from motet.core.errors import UserError
from motet.launcher.config.telling import AlertSettings, TrackingSettings, telling_problems
from motet.launcher.rank.alerts import StallAlarm, alert_settings, send, tell, url_of
from motet.launcher.rank.trackers import open_trackers
from motet.launcher.report import ended
from motet.launcher.runs.metrics import MetricsWriter
from motet.launcher.runs.rundir import RunDir
from tests.launcher import sample_report

SECRET = "T0K3N-5d41402abc"
Calls = list[tuple[Any, ...]]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    rundir = RunDir(tmp_path / "runs" / "r")
    rundir.create()
    return rundir


@pytest.fixture
def tensorboard(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls.append(("open", folder))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append(("scalar", name, value, step))

        def add_text(self, name: str, text: str, step: int) -> None:
            calls.append(("text", name, text, step))

        def close(self) -> None:
            calls.append(("close",))

    fake = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    return calls


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls: Calls = []
    fake = ModuleType("trackio")
    made = SimpleNamespace(
        log=lambda values, step=None: calls.append(("log", values, step)),
        finish=lambda: calls.append(("finish",)),
    )

    def init(**words: Any) -> Any:
        calls.append(("init", words))
        return made

    fake.init = init
    fake.Table = lambda dataframe: dataframe.to_dict("list")
    monkeypatch.setitem(sys.modules, "trackio", fake)
    return calls


def show(run: RunDir, config: dict[str, Any]) -> None:
    trackers = open_trackers(run, config, facts={"plan_sha256": "e" * 64})
    assert trackers is not None
    with MetricsWriter(run, config, mirror=trackers) as metrics:
        metrics.log("step", 1, loss=3.0, tokens=512)
        metrics.log("probe", 2, experiments={"canaries": {"rank/dose 4": 0.25}})
    ended._hand_over(trackers, sample_report.sample())
    trackers.close()


def test_all_trackers_get_rows_and_answers(run: RunDir, tensorboard: Calls, trackio: Calls) -> None:
    config = {"tracking": {"tensorboard": True, "trackio": True, "project": "p"}}
    show(run, {**config, "hub_token": SECRET})
    assert tensorboard[0] == ("open", str(run.root / "tensorboard"))
    assert ("scalar", "train/loss", 3.0, 1) in tensorboard
    assert ("scalar", "probe/canaries/rank/dose 4", 0.25, 2) in tensorboard
    (text,) = [call[2] for call in tensorboard if call[:2] == ("text", "answers")]
    assert "| canaries | question | exposure | 4.31 |" in text
    assert any(c[:3] == ("scalar", "answers/canaries/effect", 4.31) for c in tensorboard)
    assert tensorboard[-1] == ("close",)

    first = trackio[0][1]
    assert (first["project"], first["group"], first["resume"]) == ("p", "r", "allow")
    assert first["auto_log_gpu"] is first["auto_log_cpu"] is False
    assert first["config"]["plan_sha256"] == "e" * 64
    row = {"tokens": 512, "train/loss": 3.0, "by_tokens/loss": 3.0}
    assert ("log", row, 1) in trackio
    logged = [call for call in trackio if call[0] == "log"]
    assert not any("step" in values for _, values, _ in logged), "a name that Trackio keeps"
    assert logged[-1][2] == logged[-2][2] == 600, "the answers are of the last step"
    tables = [c[1]["answers"] for c in trackio if c[0] == "log" and "answers" in c[1]]
    assert tables[0]["experiment"][0] == "canaries"
    assert trackio[-1] == ("finish",)
    assert SECRET not in repr(trackio) + repr(tensorboard)

    again = len(trackio)
    show(run, config)
    assert trackio[again][1]["name"] == first["name"], "all attempts are one run"


def test_without_any_tracker_there_is_none_and_only_rank_0_has_one(run: RunDir) -> None:
    assert open_trackers(run, {"metrics": {"wandb": "off"}}) is None
    assert open_trackers(run, {"tracking": {"tensorboard": True}}, rank=1) is None


def test_a_tracker_that_fails_is_told_once_and_stops_nothing(
    run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", ModuleType("trackio"))
    said: list[str] = []
    trackers = open_trackers(run, {"tracking": {"trackio": True}}, say=said.append)
    assert trackers is not None
    for step in range(3):
        trackers.log({"kind": "step", "step": step, "loss": 1.0})
    trackers.close()
    (line,) = said
    assert line.startswith("Trackio: AttributeError")
    assert "Training goes on" in line


def test_a_missing_package_is_one_clear_error_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    both = TrackingSettings(tensorboard=True, trackio=True)
    found = telling_problems(both, AlertSettings())
    assert [one.setting for one in found] == ["tracking.tensorboard", "tracking.trackio"]
    assert "pip install 'motet[trackers]'" in str(found[0])
    assert telling_problems(TrackingSettings(), AlertSettings()) == []


@pytest.fixture
def webhook() -> Iterator[SimpleNamespace]:
    """A server that keeps what it is sent; `.code` is what it answers."""
    kept = SimpleNamespace(bodies=[], code=200)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            kept.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(kept.code)
            if kept.code == 302:
                self.send_header("Location", f"http://127.0.0.1:{kept.port}/elsewhere")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    kept.port = server.server_address[1]
    kept.url = f"http://127.0.0.1:{kept.port}/{SECRET}"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield kept
    server.shutdown()
    server.server_close()


@pytest.fixture
def alerts(webhook: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> AlertSettings:
    monkeypatch.setenv("HOOK", webhook.url)
    return AlertSettings(url_from="HOOK", timeout_s=5.0)


def test_a_message_is_for_people_and_for_programs(
    alerts: AlertSettings, webhook: SimpleNamespace
) -> None:
    assert send(alerts, "r", "end", "finished", {"step": 7}) == ""
    assert webhook.bodies == [{"text": "r: finished", "run": "r", "event": "end", "step": 7}]
    assert send(AlertSettings(), "r", "end", "finished", {}) == ""
    assert send(AlertSettings(url_from="HOOK", events=("crash",)), "r", "end", "x", {}) == ""
    assert len(webhook.bodies) == 1


@pytest.mark.parametrize("code", [302, 403, 500])
def test_a_refusal_is_told_without_the_url_and_no_redirect_is_followed(
    alerts: AlertSettings,
    webhook: SimpleNamespace,
    run: RunDir,
    capsys: pytest.CaptureFixture[str],
    code: int,
) -> None:
    webhook.code = code
    tell(alerts, run, "end", "finished")
    told = capsys.readouterr().err
    assert f"the webhook answered {code}" in told
    assert SECRET not in told
    assert len(webhook.bodies) == 1


def test_nobody_there_is_told_without_the_url_and_within_the_time_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("HOOK", f"http://127.0.0.1:{silent.getsockname()[1]}/{SECRET}")
        began = time.monotonic()
        why = send(AlertSettings(url_from="HOOK", timeout_s=0.2), "r", "end", "x", {})
        assert time.monotonic() - began < 5
    assert "cannot be reached" in why
    assert SECRET not in why


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is not set here"),
        (f"http://example.org/{SECRET}", "only https"),
        (f"http://127.0.0.1.example.org/{SECRET}", "only https"),
        (f"ftp://127.0.0.1/{SECRET}", "only https"),
        (f"file:///etc/{SECRET}", "holds no URL"),
        (SECRET, "holds no URL"),
        (f"https://[::1/{SECRET}", "holds no URL"),
        (f"https://a b/{SECRET}", "holds no URL"),
        (f"https://example.org:port/{SECRET}", "holds no URL"),
    ],
)
def test_what_is_no_secret_address_is_refused_without_showing_it(text: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        url_of(AlertSettings(url_from="HOOK"), {"HOOK": text})
    assert said in str(caught.value)
    assert SECRET not in str(caught.value)


def test_addresses_that_keep_a_secret_are_taken() -> None:
    for url in ("https://example.org/x", "http://localhost:8000/x", "http://[::1]/x"):
        assert url_of(AlertSettings(url_from="HOOK"), {"HOOK": url}) == url


def test_a_file_with_the_url_must_be_private(tmp_path: Path) -> None:
    path = tmp_path / "hook"
    path.write_text(f"https://example.org/{SECRET}\n")
    path.chmod(0o644)
    settings = AlertSettings(url_file=str(path))
    with pytest.raises(UserError, match="chmod 600") as caught:
        url_of(settings)
    assert SECRET not in str(caught.value)
    path.chmod(0o600)
    assert url_of(settings) == f"https://example.org/{SECRET}"
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        url_of(settings)


def test_a_url_in_place_of_a_variable_is_refused_without_showing_it() -> None:
    (found,) = telling_problems(
        TrackingSettings(), AlertSettings(url_from=f"https://example.org/{SECRET}")
    )
    assert "is no name of a variable" in str(found)
    assert SECRET not in str(found)


def test_a_stall_is_told_once_until_steps_come_again(
    run: RunDir, webhook: SimpleNamespace, alerts: AlertSettings
) -> None:
    alarm = StallAlarm(run, AlertSettings(url_from="HOOK", timeout_s=5.0, stall_s=0.2))
    time.sleep(0.3)
    assert webhook.bodies == [], "before the first step nothing has stalled"
    for step in (4, 5):
        alarm.log({"kind": "step", "step": step})
        deadline = time.monotonic() + 20
        while len(webhook.bodies) < step - 3 and time.monotonic() < deadline:
            time.sleep(0.02)
    time.sleep(0.3)
    alarm.close()
    assert [(body["event"], body["step"]) for body in webhook.bodies] == [
        ("stall", 4),
        ("stall", 5),
    ]


def test_settings_come_back_from_plain_data() -> None:
    plain = {"url_from": "HOOK", "events": ["end"], "stall_s": 60.0}
    assert alert_settings({"alerts": plain}) == AlertSettings(
        url_from="HOOK", events=("end",), stall_s=60.0
    )
    assert not alert_settings({}).used


@pytest.fixture
def finished(tmp_path: Path) -> RunDir:
    from tests.kept_runs import unpack

    rundir = RunDir(unpack(tmp_path) / "runs" / "finished")
    with rundir.resolved_yaml.open("a") as file:
        file.write("tracking: {tensorboard: true}\nalerts: {url_from: HOOK}\n")
    return rundir


def test_after_a_run_its_answers_are_sent_and_its_end_is_told(
    finished: RunDir,
    tensorboard: Calls,
    webhook: SimpleNamespace,
    alerts: AlertSettings,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("motet.launcher.config.telling.missing", lambda name: False)
    ended.after(finished)
    said = capsys.readouterr().err
    assert [c[1] for c in tensorboard if c[0] == "text"] == ["config", "answers"], said
    failed = ended.failed_controls(json.loads(finished.report_json.read_text()))
    events = [body["event"] for body in webhook.bodies]
    assert events == ["failed_control"] * len(failed) + ["end"]
    assert all(told in body["text"] for told, body in zip(failed, webhook.bodies, strict=False))
    kept = "".join(p.read_text(errors="replace") for p in finished.root.rglob("*") if p.is_file())
    assert SECRET not in kept + said

    finished.done.unlink()
    ended.after(finished, "exit code 1")
    assert webhook.bodies[-1]["event"] == "crash"
    assert "exit code 1" in webhook.bodies[-1]["text"]
    before = len(webhook.bodies)
    ended.after(finished)
    assert len(webhook.bodies) == before, "that a run was stopped is no news to who stopped it"


def test_failed_controls_are_named_by_their_sentences() -> None:
    report = {"answers": {"controls": {"placebo": {"name": "aa", "ok": False, "sentence": "It found."},
              "positive": {"name": "p", "ok": True}, "other": None}}}  # fmt: skip
    assert ended.failed_controls(report) == ["aa failed: It found."]
    assert ended.failed_controls({}) == []


def test_what_fails_after_a_run_is_said_in_one_line(
    run: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    run.resolved_yaml.write_text("no: [settings")
    ended.after(run, "exit code 1")
    assert capsys.readouterr().err.startswith("motet: after the run: ")
