"""Messages to a webhook: that a run ended, crashed or stalled, or that a control failed.

The URL is a secret. It is read from an environment variable or a private file when a message is
sent, and stands in no file, log or error of ours. A message that fails is told in one line without
it; nothing that happens here stops a run.
"""

from __future__ import annotations

import http.client
import ipaddress
import json
import os
import stat
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from motet.core.errors import UserError
from motet.launcher.config.telling import AlertSettings

if TYPE_CHECKING:
    from motet.launcher.runs.rundir import RunDir

MOST_URL_BYTES = 8192
LOOK_EVERY_S = 5.0


def alert_settings(config: Mapping[str, Any]) -> AlertSettings:
    """Return the section `alerts` of a configuration as plain data."""
    known = dict(config.get("alerts") or {})
    if "events" in known:
        known["events"] = tuple(known["events"])
    return AlertSettings(**known)


def url_of(settings: AlertSettings, environment: Mapping[str, str] = os.environ) -> str:
    """Return where messages go.

    Raises:
        UserError: the variable is not set, the file is missing or not private, or the URL is
            neither https nor of this machine; the message holds nothing of it.
    """
    if settings.url_from:
        where, text = f"alerts.url_from={settings.url_from}", environment.get(settings.url_from, "")
        if not text:
            raise UserError(f"{where}: the variable is not set here")
    else:
        where = f"alerts.url_file={settings.url_file}"
        text = _private_text(settings.url_file, where)
    text = text.strip()
    try:
        parts = urlsplit(text)
        host, _ = parts.hostname or "", parts.port
    except ValueError:
        raise UserError(f"{where}: holds no URL") from None
    if not host or not text.isascii() or not text.isprintable() or " " in text:
        raise UserError(f"{where}: holds no URL")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise UserError(f"{where}: only https, or http to this machine, keeps the URL a secret")
    return text


def _private_text(path: str, where: str) -> str:
    try:
        with open(path, "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(MOST_URL_BYTES + 1)
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise UserError(f"{where}: is not a file of yours alone; chmod 600 {path}")
    if len(content) > MOST_URL_BYTES:
        raise UserError(f"{where}: is longer than a URL")
    return content.decode("utf-8", errors="replace")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Another address might be neither https nor meant."""

    def redirect_request(self, *_: Any) -> None:
        return None


def send(settings: AlertSettings, run: str, event: str, text: str, facts: Mapping[str, Any]) -> str:
    """Send one message, where it is asked for; return why it could not be sent, "" otherwise.

    The body is JSON: `text` for people (what Slack, Mattermost and their like show), and `run`,
    `event` and facts for programs. Redirects are not followed.
    """
    if not settings.used or event not in settings.events:
        return ""
    body = json.dumps({"text": f"{run}: {text}", "run": run, "event": event, **facts})
    try:
        request = urllib.request.Request(
            url_of(settings),
            data=body.encode(),
            headers={"Content-Type": "application/json", "User-Agent": "motet"},
            method="POST",
        )
        opener = urllib.request.build_opener(_NoRedirect)
        with opener.open(request, timeout=settings.timeout_s):
            return ""
    except UserError as error:
        return str(error)
    except urllib.error.HTTPError as error:
        return f"the webhook answered {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        # the words of some errors hold the URL, those of their kinds do not
        reason = getattr(error, "reason", error)
        return f"the webhook cannot be reached ({type(reason).__name__})"


def tell(settings: AlertSettings, run: RunDir, event: str, text: str, **facts: Any) -> None:
    """Send a message, and say on standard error when that failed."""
    if why := send(settings, run.name, event, text, facts):
        print(f"motet: no alert of {event} was sent: {why}", file=sys.stderr, flush=True)


class StallAlarm:
    """A tracker that sends one message when steps stop coming, and again after they came back.

    It waits for the first step: what a start waits for is told elsewhere.
    """

    def __init__(self, run: RunDir, settings: AlertSettings) -> None:
        self.run, self.settings = run, settings
        self._last: tuple[float, int] | None = None
        self._told = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stall-alarm", daemon=True)
        self._thread.start()

    def log(self, row: Mapping[str, Any]) -> None:
        """Any row is a sign of life: a probe may take long."""
        self._last, self._told = (time.monotonic(), int(row["step"])), False

    def table(
        self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int
    ) -> None:
        """No concern of an alarm."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """No concern of an alarm."""

    def close(self, wait_s: float | None = None) -> None:
        """End the watch."""
        self._over.set()
        self._thread.join(1.0)

    def _watch(self) -> None:
        pause_s = min(LOOK_EVERY_S, self.settings.stall_s / 4)
        while not self._over.wait(pause_s):
            last = self._last
            if last is None or self._told:
                continue
            silent_s = time.monotonic() - last[0]
            if silent_s >= self.settings.stall_s:
                self._told = True
                text = f"no step for {silent_s:.0f} s, after step {last[1]:,}"
                tell(self.settings, self.run, "stall", text, step=last[1])
