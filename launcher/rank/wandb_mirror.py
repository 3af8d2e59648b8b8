"""Mirrors a run to Weights & Biases, when asked; a failure there never reaches training.

All of `wandb` happens in one background thread: importing it, `init` (which may wait for a dead
endpoint), and every row. The training thread only puts a dictionary in a queue. One run id is kept
in the run folder, so that all attempts are one W&B run. Nothing that could hold a secret is
captured: no code, no command line, no environment, no console, no machine description.
"""

from __future__ import annotations

import contextlib
import netrc
import os
import queue
import re
import secrets as random_source
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from motet.core.files import atomic_write
from motet.launcher.rank.mirrored_rows import history_of, member_table, probed

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

HASHES = ("definition_sha256", "plan_sha256", "lock_sha256")
REDACTED = "(redacted)"
QUEUE_ROWS = 10_000
ALERT_EVERY_S = 300.0
ALERT_EVENTS = frozenset({"rollback", "stall", "preempted"})
_SECRET_NAME = re.compile(
    r"api_?key|passw(or)?d|secret|credential|^(auth_?|access_?|bearer_?|hub_?|hf_?|api_?)?token$",
    re.IGNORECASE,
)
_SECRET_VARIABLE = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)", re.I)
Row = dict[str, Any]


@dataclass(frozen=True)
class MirrorSettings:
    """What the mirror needs to know; `from_config` reads the `metrics` section of a run."""

    mode: str
    project: str = "motet"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    job_type: str = "train"
    init_timeout_s: float = 30.0
    finish_timeout_s: float = 30.0
    stall_after_s: float = 900.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MirrorSettings:
        section = config.get("metrics") or {}
        mode = section.get("wandb", "off")
        return cls(
            mode="off" if mode in (False, None) else str(mode),  # YAML reads a bare `off` as false
            project=section.get("project") or "motet",
            entity=section.get("entity"),
            group=section.get("group"),
            tags=tuple(str(tag) for tag in section.get("tags") or ()),
        )


def open_mirror(
    rundir: RunDir,
    config: Mapping[str, Any],
    rank: int = 0,
    facts: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
) -> WandbMirror | None:
    """The mirror that `config["metrics"]` asks for: None on ranks other than 0, and when it is off.

    `config` is the run's configuration as plain data without secrets; `facts` (hashes such as
    `plan_sha256`, the model's sizes) are added to it. `say` tells the user of a failure, once.
    """
    settings = MirrorSettings.from_config(config)
    if rank != 0 or settings.mode == "off":
        return None
    return WandbMirror(rundir, config, settings, facts=facts, say=say)


class WandbMirror:
    """A queue and a thread between the run and Weights & Biases.

    No method raises or waits, but `close`.
    """

    def __init__(
        self,
        rundir: RunDir,
        config: Mapping[str, Any],
        settings: MirrorSettings,
        facts: Mapping[str, Any] | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.settings = settings
        self.run_id = stored_run_id(rundir)
        self.failure: str | None = None
        self._config = {**without_secrets(dict(config)), **(facts or {})}
        self._name = rundir.root.name
        self._folder = str(own_folder(rundir.root))
        self._say = say or (lambda message: print(message, file=sys.stderr))
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue(QUEUE_ROWS)
        self._run: Any = None
        self._alerted: dict[str, float] = {}
        self._last_step_time: float | None = None
        self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Mirror one row of `metrics.jsonl`."""
        self._put("row", dict(row))

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """Show a table, such as probe results per unit."""
        self._put("table", (name, list(columns), [list(row) for row in rows], step))

    def alert(self, title: str, text: str, level: str = "WARN") -> None:
        """Send an alert; one of the same title per five minutes."""
        self._put("alert", (title, text, level))

    def summary(self, values: Mapping[str, Any]) -> None:
        """Set summary values, such as the answers of the report."""
        self._put("summary", dict(values))

    def close(self, wait_s: float | None = None) -> None:
        """Send what is left and finish; gives up after `wait_s`, or after the two timeouts of the
        settings.
        """
        if not self._thread.is_alive():
            return
        most_s = self.settings.init_timeout_s + self.settings.finish_timeout_s + 5.0
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=min(self.settings.finish_timeout_s, wait_s or most_s))
        self._thread.join(most_s if wait_s is None else wait_s)
        if self._thread.is_alive():
            self._fail("it did not finish in time")

    def _put(self, what: str, value: Any) -> None:
        if self.failure is None:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait((what, value))

    def _fail(self, reason: str) -> None:
        if self.failure is None:
            self.failure = reason
            self._say(
                f"Weights & Biases: {reason}. Training goes on; metrics.jsonl holds every row, and "
                f"what W&B received offline is under {self._folder}/wandb (`wandb sync`)."
            )

    # ---- everything below runs in the thread

    def _work(self) -> None:
        try:
            self._run = self._start()
            handlers: dict[str, Callable[[Any], Any]] = {
                "row": self._send_row,
                "table": self._send_table,
                "alert": self._send_alert,
                "summary": lambda values: self._run.summary.update(without_secrets(values)),
            }
            for what, value in self._items():
                handlers[what](value)
            self._run.finish()
        except BaseException as error:  # a thread that only mirrors must not end anything else
            self._fail(f"{type(error).__name__}: {first_line(error)}")

    def _items(self) -> Iterator[tuple[str, Any]]:
        """What is queued, until `close`; an alert when steps stop coming."""
        while True:
            try:
                item = self._queue.get(timeout=min(30.0, self.settings.stall_after_s))
            except queue.Empty:
                silent_s = time.monotonic() - (self._last_step_time or time.monotonic())
                if silent_s >= self.settings.stall_after_s:
                    text = f"{self._name}: no training step for {silent_s:.0f} s"
                    yield "alert", ("Training has stalled", text, "ERROR")
                continue
            if item is None:
                return
            yield item

    def _start(self) -> Any:
        """The W&B run; offline when the server cannot be reached in time."""
        import wandb

        os.makedirs(os.path.join(self._folder, "wandb"), mode=0o700, exist_ok=True)
        try:
            run = self._init(wandb, self.settings.mode)
        except Exception as error:
            if self.settings.mode == "offline":
                raise
            self._say(
                f"Weights & Biases cannot be reached ({first_line(error)}); recording offline, "
                f"send it later with: wandb sync {self._folder}/wandb/offline-run-*"
            )
            wandb.teardown(exit_code=0)  # W&B still holds the id of the failed attempt to start
            run = self._init(wandb, "offline")
        run.define_metric("step")
        run.define_metric("tokens", step_metric="step")
        run.define_metric("*", step_metric="step")
        run.define_metric("train/loss", step_metric="step", summary="min")
        run.define_metric("by_tokens/*", step_metric="tokens")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        settings = self.settings
        if mode == "online" and not has_credentials(wandb.Settings().base_url):
            raise RuntimeError("no API key: set WANDB_API_KEY, or run `wandb login`")
        return wandb.init(
            id=self.run_id,
            resume="allow",
            reinit="create_new",
            mode=mode,
            project=settings.project,
            entity=settings.entity,
            name=self._name,
            group=settings.group or self._name,
            tags=list(settings.tags),
            job_type=settings.job_type,
            dir=self._folder,
            config=self._config,
            settings=wandb.Settings(
                **private_settings(), init_timeout=settings.init_timeout_s,
                finish_timeout=settings.finish_timeout_s,
            ),
        )  # fmt: skip

    def _send_row(self, row: Row) -> None:
        kind, step = row["kind"], int(row["step"])
        values = history_of(row)
        if values:
            self._run.log(values, step=step)
        if kind == "step":
            self._last_step_time = time.monotonic()
            if row.get("skipped"):
                text = f"{self._name}: step {step} was skipped (loss {row.get('loss')})"
                self._send_alert(("Bad step", text, "WARN"))
        elif kind == "event" and row.get("event") in ALERT_EVENTS:
            self._send_alert((str(row["event"]), f"{self._name}: step {step}: {row}", "WARN"))
        elif kind == "probe":
            self._send_probe_table(row)
        elif kind == "evaluation" and row.get("sizes"):
            self._send_member_table(row)

    def _send_probe_table(self, row: Row) -> None:
        import wandb

        cells = sorted(probed(row).items())
        if cells:
            table = wandb.Table(columns=["measure", "value"], data=[list(cell) for cell in cells])
            self._run.log({"step": row["step"], "probes": table}, step=int(row["step"]))

    def _send_member_table(self, row: Row) -> None:
        """Loss against size and latency of every member: what a Pareto front is drawn from."""
        import wandb

        columns, data = member_table(row)
        table = wandb.Table(columns=columns, data=data)
        self._run.log({"step": row["step"], "members": table}, step=int(row["step"]))

    def _send_table(self, value: tuple[str, list[str], list[list[Any]], int]) -> None:
        import wandb

        name, columns, rows, step = value
        table = wandb.Table(columns=list(columns), data=rows)
        self._run.log({"step": step, name: table}, step=step)

    def _send_alert(self, value: tuple[str, str, str]) -> None:
        title, text, level = value
        now = time.monotonic()
        if now - self._alerted.get(title, -ALERT_EVERY_S) >= ALERT_EVERY_S:
            self._alerted[title] = now
            self._run.alert(title=title, text=text, level=level)


def model_facts_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of the model that is trained, whatever preset or folder they came from, and its
    parameters, as W&B's configuration shows them.
    """
    names = ("parameters", "parameters_non_embedding", "flops_per_token")
    found = {name: manifest[name] for name in names if manifest.get(name) is not None}
    return found | ({"resolved_model": manifest["model"]} if manifest.get("model") else {})


def stored_run_id(rundir: RunDir) -> str:
    """The W&B id of this run folder; made once, the same for every attempt."""
    path = rundir.root / "wandb_id"
    if path.exists():
        stored = path.read_text(encoding="utf-8").strip()
        if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", stored):
            return stored
    run_id = random_source.token_hex(6)
    atomic_write(path, run_id + "\n")
    return run_id


def own_folder(root: Path) -> Path:
    """Return where W&B keeps its files, which are for their owner only: of a group, another user
    who goes on with the run has a folder of their own.
    """
    theirs = root / "wandb"
    mine = not theirs.exists() or theirs.stat().st_uid == os.geteuid()
    return root if mine else root / f"user-{os.geteuid()}"


def private_settings() -> dict[str, Any]:
    """Settings that stop W&B from capturing code, arguments, environment, console and machine."""
    return {
        "console": "off",
        "disable_code": True,
        "save_code": False,
        "disable_git": True,
        "disable_job_creation": True,
        "program": "",
        "host": "",
        "silent": True,
        "login_timeout": 1.0,
        "x_disable_meta": True,
        "x_disable_stats": True,
        "x_disable_machine_info": True,
        "x_save_requirements": False,
        "x_transaction_log_flush_interval": 2.0,
    }


def has_credentials(base_url: str) -> bool:
    """Whether W&B would find a key without asking at the terminal, which a training run must never
    do.
    """
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(base_url).hostname or ""
    named = os.environ.get("NETRC")
    paths = [named] if named else ["~/.netrc", "~/_netrc"]
    for path in paths:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(os.path.expanduser(path)).authenticators(host):
                return True
    return False


def without_secrets(value: Any, known: frozenset[str] | None = None) -> Any:
    """Copy plain data; drop what is named like a secret or holds the value of a secret variable."""
    known = secret_values() if known is None else known
    if isinstance(value, Mapping):
        return {
            name: REDACTED
            if _SECRET_NAME.search(str(name)) and item
            else without_secrets(item, known)
            for name, item in value.items()
        }
    if isinstance(value, list | tuple):
        return [without_secrets(item, known) for item in value]
    if isinstance(value, str) and any(secret in value for secret in known):
        return REDACTED
    return value


def secret_values() -> frozenset[str]:
    """Values of environment variables that are named like secrets (8 characters or more)."""
    return frozenset(
        value
        for name, value in os.environ.items()
        if _SECRET_VARIABLE.search(name) and len(value) >= 8
    )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, at most 200 characters."""
    return (str(error).strip().splitlines() or [""])[0][:200]
